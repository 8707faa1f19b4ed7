"""The batches of every step, the same for any number of ranks, and known without reading the steps before."""

from typing import Protocol

from riverrun.train.data.packing import Batch, Row, collate


class Samples(Protocol):
    """An endless sequence of rows, such as a `Mixture`."""

    def __getitem__(self, i: int) -> Row: ...


class PackedLoader:
    """Step s uses samples [s · G, (s + 1) · G) for a global batch of G rows; this rank computes a contiguous part of
    them, in micro batches. Resuming is asking for a later step.

    Raises:
        ValueError: G does not divide into micro batches on all ranks.
    """

    def __init__(
        self, samples: Samples, *, global_batch_size: int, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ):
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"a global batch of {global_batch_size} rows does not divide into micro batches of "
                f"{micro_batch_size} on {dp_size} ranks"
            )
        self.samples = samples
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rows_per_rank = global_batch_size // dp_size
        self.first_row = dp_rank * self.rows_per_rank

    def step(self, step: int) -> list[Batch]:
        """This rank's micro batches of optimiser step `step`, counted from 0."""
        first = step * self.global_batch_size + self.first_row
        starts = range(first, first + self.rows_per_rank, self.micro_batch_size)
        return [collate([self.samples[i] for i in range(s, s + self.micro_batch_size)]) for s in starts]
