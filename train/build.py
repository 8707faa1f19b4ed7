"""What a recipe means on so many ranks: the micro batches and the model."""

import random
from collections.abc import Mapping

import numpy as np
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.parallel.mesh import ALONE, Axis
from riverrun.modeling.parallel.sharding import build_sharded
from riverrun.train import initial
from riverrun.train.batches import plan_micro_batches
from riverrun.train.config import Recipe


def fit(recipe: Recipe, dp_size: int) -> tuple[Recipe, str]:
    """The recipe with the micro batch that `dp_size` data-parallel ranks compute, and what to tell the user of it.

    Raises:
        ValueError: the global batch does not divide among them.
    """
    train, parallel = recipe.train, recipe.parallel
    if recipe.engine.zero_stage == 3 and train.eval_rows < dp_size:
        raise ValueError(
            f"train.eval_rows={train.eval_rows} is less than the {dp_size} data-parallel ranks, each of which "
            f"has to evaluate a row under engine.zero_stage=3: set train.eval_rows={dp_size} or more"
        )
    plan = plan_micro_batches(
        train.global_batch_size, train.micro_batch_size, dp_size, tp=parallel.tp, cp=parallel.cp,
        seq_len=recipe.data.seq_len,
    )  # fmt: skip
    return recipe.model_copy(update={"train": train.model_copy(update={"micro_batch_size": plan.rows})}), plan.note


def build_model(
    recipe: Recipe, tp: Axis = ALONE, weights: Mapping[str, torch.Tensor] | None = None
) -> RiverrunForCausalLM:
    """Seeds the random number generators, then builds this rank's part of the model, in fp32 on the CPU, with its
    initial weights: its part of those given, or else the same for a seed on any number of ranks and every device."""
    random.seed(recipe.train.seed)
    np.random.seed(recipe.train.seed)  # noqa: NPY002 - libraries still draw from the global generator
    torch.manual_seed(recipe.train.seed)
    model = build_sharded(RiverrunConfig.from_options(recipe.model), tp)
    if weights is not None:
        initial.adopt(model, weights, tp)
    model.train()
    model.set_recompute(recipe.train.recompute)
    if recipe.train.compile:
        model.compile_blocks()
    return model
