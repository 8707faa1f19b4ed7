"""A run from its start to its end."""

import contextlib
import os
import socket
import sys
from functools import partial
from pathlib import Path

from riverrun.train import initial, outcome
from riverrun.train.build import build_model, fit
from riverrun.train.config import Recipe
from riverrun.train.description import check_same_software
from riverrun.train.distributed import Ranks
from riverrun.train.inputs import open_inputs
from riverrun.train.interrupt import Interrupt
from riverrun.train.lock import RunLock
from riverrun.train.resume import find_start
from riverrun.train.trainer import Outcome, Trainer
from riverrun.train.watchdog import Watchdog


def run(recipe: Recipe, run_dir: Path, resume: str, ranks: Ranks, job: str = "", agent: bool = False) -> Outcome:
    """Trains `recipe` in `run_dir`. Called on every rank alike, within a process group.

    The folder then holds config.toml, config.json (the model's), tokenizer/, versions.json, metrics.jsonl,
    events.jsonl, outcome.json, tensorboard/, checkpoints/, heartbeats/ and loss.png.

    Args:
        recipe: resolved and without problems.
        resume: see `resume.find_start`.
        job: the scheduler's number of this job, for `riverrun status`.
        agent: the process that started this one is torchrun's: without it, this one ends.

    Raises:
        ValueError: whatever the user has to mend: ranks, data, folders, another run in the folder, a diverging run.
    """
    asked = recipe
    recipe, note = fit(asked, ranks.mesh.dp.size)
    lock = RunLock(run_dir)
    with Interrupt() as interrupt, contextlib.ExitStack() as stack:
        check_same_software(ranks)
        start = ranks.first(lambda: find_start(run_dir, resume, recipe, _warn))
        ranks.first(lock.acquire)
        stack.callback(lock.release)
        if ranks.rank == 0:
            stack.push(partial(_tell, run_dir, start.step, recipe.train.steps, job))
        watchdog, guard = None, recipe.guard
        if guard.stall_minutes:
            watchdog = stack.enter_context(
                Watchdog(
                    run_dir, ranks.rank, ranks.world_size, socket.gethostname(), parent=agent,
                    start_seconds=60 * guard.start_stall_minutes, stall_seconds=60 * guard.stall_minutes,
                )
            )  # fmt: skip
        inputs = open_inputs(recipe, ranks, start.state["stores"] if start.state else None)
        weights = None
        if (source := recipe.train.init_from) is not None and start.checkpoint is None:
            weights = initial.read(ranks.first(lambda: initial.locate(source)), recipe.model)
        model = build_model(recipe, ranks.mesh.tp, weights)
        accumulation = recipe.train.global_batch_size // (recipe.train.micro_batch_size * ranks.mesh.dp.size)
        trainer = Trainer(recipe, run_dir, ranks, model, inputs, start, accumulation, interrupt, watchdog, job, asked)
        stack.callback(trainer.close)
        if note:
            trainer.records.display.say(note, style="yellow")
        return trainer.train()


def _tell(
    run_dir: Path, step: int, steps: int, job: str, kind: object, error: BaseException | None, *_: object
) -> None:
    """What a run ended by that the user has to mend, in outcome.json: another start would end the same way."""
    if isinstance(error, ValueError):
        before = outcome.read(run_dir)
        if before is not None and before.state == "running" and before.pid == os.getpid():
            step = before.step
        with contextlib.suppress(OSError):
            standing = outcome.Standing(
                "failed", step, steps, exit_code=outcome.USER_ERROR, message=str(error), job=job
            )
            outcome.write(run_dir, standing)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
