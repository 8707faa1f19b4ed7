"""The batches of every step, the same for any number of ranks, and known without reading the steps before."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from riverrun.train.data.packing import Batch, Row
from riverrun.train.recurrence import Recurrence


class Samples(Protocol):
    """An endless sequence of rows, such as a `Mixture`."""

    def __getitem__(self, i: int) -> Row: ...

    def pairs(self, i: int) -> int: ...


class PackedLoader:
    """Step s uses samples [s · G, (s + 1) · G) for a global batch of G rows; this rank computes some of them, in micro
    batches. Resuming is asking for a later step.

    Args:
        collate: (rows, their samples' numbers, step) → a micro batch.
        balance: attention's cost depends on the lengths of a row's documents, and the ranks of a step wait for the
            slowest: deal the step's rows to them by that cost, in turns from both sides, so that sums are even, and
            costly rows fall into the same micro batch everywhere. Otherwise a rank's rows are neighbours.
        carries: (a row, its sample's number) → whether it goes on from the state of the row in its place a step before.
        recurrence: how deep a recurrent-depth model goes in each micro batch. The rows are then always dealt in turns:
            those of the same micro batch of all ranks are the same for any number of ranks.
        row_keys: rows' numbers → their keys, for another model that draws something for each.

    Raises:
        ValueError: G does not divide into micro batches on all ranks.
    """

    def __init__(
        self,
        samples: Samples,
        collate: Callable[[Sequence[Row], Sequence[int], int], Batch],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        balance: bool = False,
        carries: Callable[[Row, int], bool] | None = None,
        recurrence: Recurrence | None = None,
        row_keys: Callable[[Sequence[int]], torch.Tensor] | None = None,
    ):
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"a global batch of {global_batch_size} rows does not divide into micro batches of "
                f"{micro_batch_size} on {dp_size} ranks"
            )
        self.samples, self.collate = samples, collate
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size, self.balance = dp_rank, dp_size, balance
        self.carries, self.recurrence = carries, recurrence
        self.row_keys = row_keys if recurrence is None else recurrence.row_keys

    def step(self, step: int) -> list[Batch]:
        """This rank's micro batches of optimiser step `step`, counted from 0."""
        rows = self._rows(step)
        parts = [rows[start : start + self.micro_batch_size] for start in range(0, len(rows), self.micro_batch_size)]
        batches = [self._batch(part, step) for part in parts]
        if self.row_keys is not None:
            batches = [replace(batch, row_keys=self.row_keys(part)) for batch, part in zip(batches, parts)]
        if self.recurrence is not None:
            depths = self.recurrence.steps(step, len(parts))
            batches = [replace(batch, num_steps=n) for batch, n in zip(batches, depths)]
        return batches

    def _batch(self, numbers: Sequence[int], step: int) -> Batch:
        rows = [self.samples[i] for i in numbers]
        batch = self.collate(rows, numbers, step)
        if self.carries is None:
            return batch
        return replace(batch, carries=torch.tensor([self.carries(row, i) for row, i in zip(rows, numbers)]))

    def _rows(self, step: int) -> list[int]:
        rows = range(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        if self.recurrence is None and (not self.balance or self.dp_size == 1):
            per_rank = len(rows) // self.dp_size
            return list(rows[self.dp_rank * per_rank : (self.dp_rank + 1) * per_rank])
        order = sorted(rows, key=self.samples.pairs, reverse=True) if self.balance else rows
        turns = [order[start : start + self.dp_size] for start in range(0, len(rows), self.dp_size)]
        return [turn[self.dp_rank if i % 2 == 0 else -1 - self.dp_rank] for i, turn in enumerate(turns)]
