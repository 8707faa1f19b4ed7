"""What a checkpoint costs training: written in its place, and beside it."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from statistics import median

import torch

from riverrun.train import engine as engines
from riverrun.train.build import build_model, fit
from riverrun.train.config import Recipe
from riverrun.train.data.packing import Batch
from riverrun.train.distributed import Ranks
from riverrun.train.saver import Saver


@dataclass(frozen=True)
class Cost:
    """Of one way to write, in seconds on rank 0, medians over saves.

    Attributes:
        stall: what training waited for.
        first: the same of the first one beside training, which allocates the host's memory for the copy; later ones use
            it again, and only they are in the medians. None: written in its place.
        write: from the beginning to the checkpoint's being in its place.
        step: a step of one micro batch while nothing is written.
        step_beside: a step while a checkpoint is being written; None: there was none.
        bytes: of the checkpoint.
    """

    asynchronous: bool
    stall: float
    first: float | None
    write: float
    step: float
    step_beside: float | None
    bytes: int


def measure(recipe: Recipe, folder: Path, ranks: Ranks, saves: int) -> Iterator[Cost]:
    """Trains a recipe's model on random tokens, one micro batch a step, and saves it into `folder`, which is emptied
    afterwards; first in training's place, then beside it."""
    recipe, _ = fit(recipe, ranks.mesh.dp.size)
    train, length = recipe.train, recipe.data.seq_len
    engine = engines.Engine(
        build_model(recipe, ranks.mesh.tp), recipe.optimizer, train, recipe.engine, ranks, 1, recipe.parallel
    )
    tokens = torch.randint(recipe.model.vocab_size, (train.micro_batch_size, length + 1))
    bounds = torch.arange(0, train.micro_batch_size * length + 1, length, dtype=torch.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), bounds, train.micro_batch_size * length)

    def step() -> float:
        began = time.perf_counter()
        engine.accumulate([batch])
        engine.step(1.0)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    alone = median(step() for _ in range(5))
    numbers = count()
    for asynchronous in (False, True):
        saver = Saver(folder, 1, ranks, asynchronous)
        saved, beside = [], []
        for number in islice(numbers, saves + asynchronous):
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            saver.start(number, engine, {})
            # as in training, ranks go on together until the last one has written
            while asynchronous and ranks.total(saver.written)[0] < ranks.world_size:
                beside.append(step())
            done = saver.finish()
            assert done is not None
            saved.append(done)
        saver.close()
        first = saved.pop(0).stall if asynchronous else None
        yield Cost(
            asynchronous,
            median(s.stall for s in saved),
            first,
            median(s.seconds for s in saved),
            alone,
            median(beside) if beside else None,
            saved[-1].bytes,
        )
    if ranks.rank == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
