"""Where a run starts from: the beginning, or a checkpoint; and whether it may."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from riverrun.train import checkpoint, manifest
from riverrun.train.config import Recipe
from riverrun.train.recipe import LABELS, difference, load_recipe

# What a resumed run may do differently: none of it changes what the steps so far would have been, except train.steps
# (the cosine schedule's length) and schedule.decay_steps, which exist to be extended. Results then agree to rounding
# where micro batches, recompute, compile, the device or the layout over ranks differ, and bitwise where they do not.
MAY_CHANGE = (
    *LABELS,
    "data.held_out",
    "train.steps",
    "train.micro_batch_size",
    "train.recompute",
    "train.compile",
    "train.log_every",
    "train.eval_every",
    "train.eval_rows",
    "train.recurrence.eval_steps",
    "schedule.decay_steps",
    "engine.device",
    "engine.zero_stage",
    "parallel",
    "profile",
    "engine.start_timeout_minutes",
    "engine.collective_timeout_minutes",
    "checkpoint",
    "guard",
    "log",
)

# what launchers, the lock and the watchdog write into a folder before there is a run in it
BESIDE = {"lock", "slurm", "ranks", "heartbeats", "stalls", "stop-request", "outcome.json", "events.jsonl"}


@dataclass(frozen=True)
class Start:
    """A run's start: `step` optimiser steps are done, and lie in `checkpoint` (None: none are) with its `state`."""

    step: int = 0
    checkpoint: Path | None = None
    state: dict[str, Any] | None = None


def find_start(run_dir: Path, resume: str, recipe: Recipe, say: Callable[[str], None]) -> Start:
    """Resolves `--resume auto|never|PATH` for a run folder.

    Args:
        resume: auto: the newest intact checkpoint of `run_dir`, or the beginning if it has none; never: the folder must
            be new; else a checkpoint, or a run folder whose newest intact checkpoint is meant.
        say: is told of damaged checkpoints that are passed over.

    Raises:
        ValueError: the folder belongs to something else or to a run of another recipe, or has checkpoints of which
            none is intact.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"--run-dir {run_dir} is a file: name a folder")
    occupied = run_dir.is_dir() and any(path.name not in BESIDE for path in run_dir.iterdir())
    if resume == "never":
        if occupied:
            raise ValueError(f"--run-dir {run_dir} is not empty: use another folder, or --resume auto to go on there")
        return Start()
    source = run_dir if resume == "auto" else Path(resume)
    if resume != "auto" and not source.is_dir():
        raise ValueError(f"--resume {resume} does not exist: give auto, never, a checkpoint or a run folder")

    found: Path | None
    if (source / "trainer.json").exists():
        found = source.resolve()
        wrong = manifest.problem(found)
        if wrong is not None:
            raise ValueError(f"--resume {resume}: {wrong}; choose another checkpoint")
    else:
        found = checkpoint.latest(source, say)
        if found is None and checkpoint.checkpoints(source):
            raise ValueError(
                f"no checkpoint in {checkpoint.folder_of(source)} is intact: remove that folder to start anew"
            )
    if resume != "auto" and found is None:
        raise ValueError(f"--resume {resume} holds no checkpoint: give a folder like RUN_DIR/checkpoints/step_00001000")

    if found is None:
        if occupied:
            _check_folder(run_dir, recipe)
        return Start()
    state = checkpoint.read_state(found)
    _check_same(Recipe.model_validate_json(json.dumps(state["recipe"])), recipe, found)
    if state["step"] > recipe.train.steps:
        raise ValueError(f"checkpoint {found} is beyond train.steps={recipe.train.steps}: raise train.steps")
    return Start(state["step"], found, state)


def check_space(run_dir: Path, needed: float) -> str | None:
    """A warning if the disk cannot hold one checkpoint of `needed` bytes."""
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        return f"{run_dir} has {free / 2**30:.1f} GiB free, a checkpoint needs about {needed / 2**30:.1f} GiB"
    return None


def _check_folder(run_dir: Path, recipe: Recipe) -> None:
    """A folder without checkpoints may be one whose run died early, of the same recipe."""
    config = run_dir / "config.toml"
    if not config.exists():
        raise ValueError(f"--run-dir {run_dir} is not empty and holds no run: name a new folder")
    _check_same(load_recipe(str(config)).recipe, recipe, run_dir)


def _check_same(there: Recipe, here: Recipe, where: Path) -> None:
    different = difference(there, here, ignore=MAY_CHANGE)
    if different:
        raise ValueError(
            f"{where} belongs to a run of another recipe:\n"
            + "\n".join(f"  - {line}" for line in different)
            + "\nuse another --run-dir, or the values it was started with"
        )
