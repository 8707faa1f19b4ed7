"""Word problems of permutation groups (Merrill et al. 2024, "The Illusion of State", arXiv 2404.08819).

A token is an element g_t, drawn uniformly; the target at t is g_1 · g_2 ⋯ g_t. A5 and S5 are not solvable: their word
problem is complete for NC1, beyond a transformer or diagonal linear RNN of fixed depth. Training at 128 and testing up
to 512 follows DeltaProduct (arXiv 2502.10297), as do one layer of width 128 and about 5000 steps; its rows a step are
2048.
"""

from functools import cache
from itertools import permutations
from typing import ClassVar

import numpy as np

from riverrun.eval.studies.task import Batch, Defaults, SequenceTask


@cache
def elements(degree: int, even_only: bool) -> tuple[tuple[int, ...], ...]:
    """The permutations of a symmetric or alternating group in lexical order, the identity first: i ↦ p[i]."""
    everything = permutations(range(degree))
    return tuple(p for p in everything if not even_only or inversions(p) % 2 == 0)


def inversions(p: tuple[int, ...]) -> int:
    """Pairs that a permutation puts out of order; it is even if they are."""
    return sum(p[i] > p[j] for j in range(len(p)) for i in range(j))


@cache
def products(degree: int, even_only: bool) -> np.ndarray:
    """(|G|, |G|): entry (a, b) is the index of a · b, which maps i to a[b[i]]."""
    group = elements(degree, even_only)
    index = {p: i for i, p in enumerate(group)}
    return np.array([[index[tuple(a[i] for i in b)] for b in group] for a in group])


class WordProblem(SequenceTask):
    """The product so far at each position; scored at the last one."""

    defaults: ClassVar[Defaults] = Defaults(
        train_length=128, test_lengths=(256, 512), width=128, steps=5000, batch_size=256
    )
    scored = "last"
    degree: ClassVar[int]
    even_only: ClassVar[bool] = False

    @property
    def order(self) -> int:
        """|G|."""
        return len(elements(self.degree, self.even_only))

    def vocab_size(self, train_length: int) -> int:
        return self.order

    @property
    def answers(self) -> range:
        return range(self.order)

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        table = products(self.degree, self.even_only)
        inputs = rng.integers(0, self.order, (rows, length))
        targets = np.empty_like(inputs)
        state = np.zeros(rows, dtype=np.int64)
        for t in range(length):
            targets[:, t] = state = table[state, inputs[:, t]]
        return Batch(inputs, targets)


class S3(WordProblem):
    name, degree = "s3", 3


class S4(WordProblem):
    name, degree = "s4", 4


class S5(WordProblem):
    name, degree = "s5", 5


class A5(WordProblem):
    name, degree, even_only = "a5", 5, True
