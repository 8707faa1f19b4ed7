"""DeepSpeed's universal checkpoint format: what it has to know of a model's plan, and checkpoints rewritten in it."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from riverrun.modeling.hf.folder import new_folder
from riverrun.modeling.parallel.split import Split
from riverrun.train import checkpoint
from riverrun.train import engine as engines


def description(plan: Mapping[str, Split | None], shapes: Mapping[str, torch.Size], tp: int) -> dict[str, Any]:
    """How DeepSpeed puts a tensor-parallel checkpoint together: patterns of parameters' names, generated from the plan.

    Args:
        shapes: of the whole parameters.
    """
    patterns = {name: f"{re.escape(name)}$" for name in plan}
    blocks = {name: split for name, split in plan.items() if split is not None and split.blocks > 1}
    parts: list[dict[str, Any]] = []
    for name, split in blocks.items():
        shape: list[Any] = list(shapes[name])
        shape[split.dim] = (shapes[name][split.dim] // split.blocks,) * split.blocks
        parts.append({"patterns": [patterns[name]], "shape": tuple(shape), "partition_dim": split.dim})

    def along(dim: int) -> list[str]:
        return [patterns[n] for n, s in plan.items() if s is not None and s.dim == dim and n not in blocks]

    return {
        "universal_checkpoint_version": 0.4,
        "tp_replicated_parameter_patterns": [patterns[n] for n, split in plan.items() if split is None],
        "parameter_with_row_parallelism_patterns": along(1),  # all others are split along dimension 0
        "parameter_with_sub_params": parts,
        "sub_param_shard_widths": {
            part["patterns"][0]: [[size // tp] * tp for size in part["shape"][part["partition_dim"]]] for part in parts
        },
    }


def reshard(run_dir: Path, out: Path, step: int | None = None) -> Path:
    """Writes a run's checkpoint as one of no layout in DeepSpeed's universal format: `zero/zero/NAME/fp32.pt`,
    `exp_avg.pt`, `exp_avg_sq.pt` and `step.pt` hold the whole of every parameter.

    Args:
        out: a new folder, a checkpoint like any other: a run on any layout resumes from it.
        step: of which checkpoint; None: the newest one that is intact.

    Raises:
        ValueError: no such checkpoint, one of Muon (the format has no place for its state), or `out` exists.
    """
    source = checkpoint.find(run_dir, step)
    state = checkpoint.read_state(source)
    if state["recipe"]["optimizer"]["name"] != "adamw":
        raise ValueError(
            f"{source} holds the state of Muon, for which DeepSpeed's universal format has no place; a run on another "
            "number of ranks resumes from it as it is"
        )
    with new_folder(out) as folder:
        engines.to_universal(source / engines.TAG, folder / engines.TAG)
        shutil.rmtree(folder / engines.TAG / "tmp", ignore_errors=True)
        checkpoint.describe(folder, state | {"layout": checkpoint.UNIVERSAL})
    return out
