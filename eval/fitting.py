"""How many things at a time the memory of a device takes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Auto(int):
    """A batch size to begin with, which is halved whenever it does not fit. Any other whole number is kept to."""


AUTO = Auto(64)


class Fitting:
    """Calls work with a batch size, again with half of it while the memory is too small, and remembers what fitted."""

    def __init__(self, batch_size: int):
        """Raises ValueError if the size is below 1."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.size, self.auto = int(batch_size), isinstance(batch_size, Auto)

    def __call__(self, work: Callable[[int], R]) -> R:
        """`work(size)`, which must have no effect but its result.

        Raises:
            ValueError: the memory is too small for the size that was asked for, or for 1.
        """
        while True:
            try:
                return work(self.size)
            except torch.OutOfMemoryError as error:
                if not self.auto or self.size == 1:
                    mend = "read shorter texts, or less of them at once" if self.size == 1 else "lower it, or give auto"
                    raise ValueError(
                        f"the memory of the GPU is too small for --batch-size {self.size}: {mend}"
                    ) from error
            # the exception, which holds on to the tensors of the failed call, is gone by now
            self.size //= 2
            torch.cuda.empty_cache()


def in_batches(items: Sequence[T], batch_size: int, work: Callable[[list[T]], R]) -> Iterator[tuple[list[T], R]]:
    """Neighbours, as many as fit, and what `work` makes of them."""
    fit, start = Fitting(batch_size), 0
    while start < len(items):

        def attempt(size: int, start: int = start) -> tuple[list[T], Any]:
            part = list(items[start : start + size])
            return part, work(part)

        part, result = fit(attempt)
        yield part, result
        start += len(part)
