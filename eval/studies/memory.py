"""N-parity and N-DMS, tasks whose memory grows (Khajehabdollahi et al. 2023, "Emergent mechanisms for long timescales
depend on training curriculum and affect performance in memory tasks", arXiv 2309.12927)."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from riverrun.eval.studies.task import Batch, Defaults, Task, generator

FIRST = 2  # the N that a curriculum starts with


@dataclass(frozen=True)
class MemoryTask(Task):
    """Bits in, and at the last of them one bit out for each N that is asked for. The length of a study is N.

    A model has two logits a head. The "multi" curriculum adds a head for each new N and goes on training the old ones;
    "single" moves its only head from N to N + 1. Answers are read at the last bit, with the head's two logits alone.
    """

    defaults: ClassVar[Defaults] = Defaults(
        train_length=16, test_lengths=(2, 4, 8, 16), steps=6000, batch_size=256, learning_rates=(1e-3, 3e-3, 1e-2)
    )
    shortest = FIRST

    curriculum: Literal["single", "multi"] = "multi"
    advance_above: float = 0.98  # go on to N + 1 when the newest head and the mean of the heads are above this

    def head(self, n: int) -> int:
        """The head that answers for N = n."""
        return n - FIRST if self.curriculum == "multi" else 0

    def trained(self, n: int) -> range:
        """The Ns that are trained while N = n is the newest."""
        return range(FIRST if self.curriculum == "multi" else n, n + 1)

    def vocab_size(self, train_length: int) -> int:
        return 2 * (self.head(train_length) + 1)

    @property
    def answers(self) -> range:
        return range(2)

    def problems(self, lengths: tuple[int, ...]) -> list[str]:
        found = super().problems(lengths)
        if not 0.5 <= self.advance_above < 1:
            found.append(f"{self.name}.advance_above={self.advance_above} must be in [0.5, 1); the paper has 0.98")
        train_length, *test_lengths = lengths
        if above := [n for n in test_lengths if n > train_length]:
            found.append(
                f"{self.name} ends at N = {train_length} and cannot be tested at {above}: raise --train-length"
            )
        return found

    def batch(self, stream: int, seed: int, step: int, rows: int, ns: range) -> Batch:
        """Bits and the labels of several N.

        Returns:
            inputs (rows, M), M drawn from [N + 2, 4N + 2) with the largest N; targets (rows, len(ns)).
        """
        rng = generator(stream, seed, step)
        M = int(rng.integers(ns[-1] + 2, 4 * ns[-1] + 2))
        bits = self.bits(rng, rows, M)
        return Batch(bits, np.stack([self.label(bits, n) for n in ns], axis=1))

    @abstractmethod
    def bits(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """(rows, length)."""

    @abstractmethod
    def label(self, bits: np.ndarray, n: int) -> np.ndarray:
        """(rows,) the right answers for N = n."""


class NParity(MemoryTask):
    """Whether the last N bits have an odd number of ones. Each row has its own rate of ones, p ~ U(0, 1).

    With that, even N have more even rows: always answering 0 is right in 1/2 + 1/(2N + 2) of them, above `chance`.
    """

    name = "n_parity"

    def bits(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        return (rng.random((rows, length)) < rng.random((rows, 1))).astype(np.int64)

    def label(self, bits: np.ndarray, n: int) -> np.ndarray:
        return bits[:, -n:].sum(1) % 2


class NDelayedMatch(MemoryTask):
    """N-DMS, delayed match to sample: is the last bit the same as the N-th from the end."""

    name = "n_dms"

    def bits(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        return rng.integers(0, 2, (rows, length))

    def label(self, bits: np.ndarray, n: int) -> np.ndarray:
        return (bits[:, -n] == bits[:, -1]).astype(np.int64)
