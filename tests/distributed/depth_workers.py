"""Ranks that train a small model of recurrent depth as the loader deals its rows, for the tests of parity."""

import functools
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.sharding import build_sharded
from riverrun.modeling.statistics import take_noted
from riverrun.train import engine as engines
from riverrun.train.config import EngineConfig, OptimizerConfig, RecurrenceConfig, TrainConfig
from riverrun.train.data.loader import PackedLoader
from riverrun.train.data.packing import Row, collate
from riverrun.train.distributed import Ranks
from riverrun.train.recurrence import Recurrence
from tests.modeling.parallel.sharded import BASE
from tests.ranks import mesh as mesh_of

ROWS, LENGTH, STEPS, MICRO_BATCHES = 8, 16, 3, 2
DEPTH = DepthOptions(prelude_layers=1, coda_layers=1, mean_recurrence=3, backprop_depth=2)
SHAPES = {
    "attention": replace(
        BASE, num_hidden_layers=3, layer_pattern=("attention",), sandwich_norm=True, scale_embedding=True,
        initializer="takase", depth=DEPTH, attention=replace(BASE.attention, qk_bias=True),
    ),
    "hybrid": replace(
        BASE, num_hidden_layers=4, layer_pattern=("attention", "mamba2", "gated_delta", "attention"),
        depth=replace(DEPTH, injection="diagonal"), tie_word_embeddings=True,
    ),
}  # fmt: skip


class Samples:
    """Rows of a few documents, drawn by their number; they have unlike numbers of targets."""

    def __getitem__(self, i: int) -> Row:
        rng = np.random.default_rng(i)
        ids, targets = rng.integers(0, BASE.vocab_size, (2, LENGTH))
        targets[: 2 * i % LENGTH] = -100
        return Row(ids, targets, np.unique(rng.integers(1, LENGTH, i % 3)))

    def pairs(self, i: int) -> int:
        return 7 * i % 5


def train_compiled(shape: str, stage: int):
    """`train` with iterations that are traced as they are when compiled, but left to torch's own kernels."""
    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        return train(shape, 1, 1, stage, True, True)


def train(shape: str, cp: int, tp: int, stage: int, recompute: bool, compile_blocks: bool = False):
    """STEPS steps: losses, the gradients' norms, losses of an evaluation at some depths, and this rank's weights; and
    what was noted of the recurrence."""
    world = torch.distributed.get_world_size()
    mesh, rank = mesh_of(cp, tp), torch.distributed.get_rank()
    ranks = Ranks(rank, world, rank, torch.device("cpu"), mesh)
    torch.manual_seed(0)
    options: ModelOptions = SHAPES[shape]
    model = build_sharded(RiverrunConfig.from_options(options), mesh.tp).train()
    model.set_recompute(recompute)
    if compile_blocks:
        model.compile_blocks()
    micro = ROWS // mesh.dp.size // MICRO_BATCHES
    engine = engines.Engine(
        model,
        OptimizerConfig(lr=2e-2, grad_clip=0.5, eps=1e-2),  # a small eps would turn rounding into whole steps
        TrainConfig(dtype="fp32", micro_batch_size=micro, z_loss=1e-2),
        EngineConfig(zero_stage=stage),
        ranks,
        MICRO_BATCHES,
    )
    assert options.depth is not None
    loader = PackedLoader(
        Samples(), lambda rows, *_: collate(rows), global_batch_size=ROWS, micro_batch_size=micro,
        dp_rank=mesh.dp.rank, dp_size=mesh.dp.size, balance=True,
        recurrence=Recurrence(options.depth, RecurrenceConfig(ramp_steps=2), seed=0),
    )  # fmt: skip
    take_noted()
    losses, norms, depths = [], [], []
    for step in range(STEPS):
        batches = loader.step(step)
        depths.append([batch.num_steps for batch in batches])
        targets = sum(batch.num_targets for batch in batches) if mesh.leads else 0
        summed, targets = ranks.total(engine.accumulate(batches).item(), targets)
        losses.append(summed / targets)
        norms.append(engine.step(1.0).grad_norm)
    noted = take_noted()
    rows = [replace(batch, num_steps=None, row_keys=None) for batch in loader.step(99)]
    held_out = [ranks.total(sum(engine.evaluate(batch, r).item() for batch in rows))[0] for r in (None, 1, 4)]
    parameters = dict(engine.module.named_parameters())
    with GatheredParameters(list(parameters.values()), enabled=stage == 3):
        weights = {name: p.detach().float() for name, p in parameters.items()}
    return losses, norms, held_out, weights, mesh.tp.rank, depths, noted
