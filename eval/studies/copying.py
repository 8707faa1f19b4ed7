"""Copying a string (Jelassi et al. 2024, "Repeat After Me", arXiv 2402.01032)."""

from typing import ClassVar

import numpy as np

from riverrun.eval.studies.task import IGNORED, Batch, Defaults, SequenceTask

LETTERS = 26
EOS, BOS, COPY = range(LETTERS, LETTERS + 3)


class Copying(SequenceTask):
    """BOS x COPY x: from COPY on the targets are x and then EOS. The length is that of x.

    The model sees the right letters so far, not its own; a row without any error is one that greedy decoding copies.
    """

    name = "copying"
    defaults: ClassVar[Defaults] = Defaults(
        train_length=50, test_lengths=(100, 200, 400), layers=2, steps=4000, uniform_lengths=True
    )

    def vocab_size(self, train_length: int) -> int:
        return LETTERS + 3

    @property
    def answers(self) -> range:
        return range(EOS + 1)

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        x = rng.integers(0, LETTERS, (rows, length))
        one = np.ones((rows, 1), dtype=np.int64)
        inputs = np.hstack([BOS * one, x, COPY * one, x])
        targets = np.hstack([np.full((rows, length + 1), IGNORED), x, EOS * one])
        return Batch(inputs, targets)
