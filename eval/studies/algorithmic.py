"""Copying, reversing and adding decimal strings, the length generalisation of the Universal Transformer's paper
(Dehghani et al. 2018, arXiv 1807.03819, section 3.2; data as in tensor2tensor's `algorithmic_*_decimal40`).

`START x ASK y`: from ASK on the targets are y and then END. The model sees the right answer so far, not its own; a row
without any error is one that greedy decoding answers. The length is that of x. The paper trains on lengths up to 40 and
tests at 400; there an encoder reads x and a decoder writes y, here one causal model does both.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from riverrun.eval.studies.task import IGNORED, Batch, Defaults, SequenceTask

BASE = 10
END, START, ASK, PLUS = range(BASE, BASE + 4)


class DecimalTask(SequenceTask):
    """A string of digits in, digits out."""

    defaults: ClassVar[Defaults] = Defaults(
        train_length=40,
        test_lengths=(80, 160, 400),
        layers=2,
        width=128,
        steps=4000,
        learning_rates=(3e-4, 1e-3, 3e-3),
        uniform_lengths=True,
    )

    def vocab_size(self, train_length: int) -> int:
        return PLUS + 1

    @property
    def answers(self) -> range:
        return range(END + 1)

    @abstractmethod
    def question(self, rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """x (R, length), and y (R, A), END where an answer is shorter than the longest possible one."""

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        x, y = self.question(rng, rows, length)
        one = np.ones((rows, 1), dtype=np.int64)
        asked = np.hstack([y, END * one])
        asked[:, 1:][y == END] = IGNORED  # after the first END
        return Batch(
            np.hstack([START * one, x, ASK * one, y]), np.hstack([np.full((rows, length + 1), IGNORED), asked])
        )


class Copy(DecimalTask):
    """y is x."""

    name = "copy"

    def question(self, rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.integers(0, BASE, (rows, length))
        return x, x


class Reverse(DecimalTask):
    """y is x backwards."""

    name = "reverse"

    def question(self, rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.integers(0, BASE, (rows, length))
        return x, x[:, ::-1]


@dataclass(frozen=True)
class Addition(DecimalTask):
    """x is a + b, y their sum; no number starts with a zero but 0 itself.

    The digits of x are split between them at a place drawn uniformly. The paper's data has the least significant digit
    first, as is the default here, and draws the one number's length and then the other's.
    """

    name: ClassVar[str] = "addition"
    shortest: ClassVar[int] = 3

    least_first: bool = True  # the least significant digit of each number first, or last as people write them

    def question(self, rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        size = rng.integers(1, length - 1, (rows, 1))
        sizes = size, length - 1 - size
        a, b = (_number(rng, length, n) for n in sizes)
        total, digits = _sum(a, b, np.maximum(*sizes))
        return self._write(a, sizes[0], b, sizes[1], length), self._in_order(total, digits)

    def _write(self, a: np.ndarray, a_size: np.ndarray, b: np.ndarray, b_size: np.ndarray, length: int) -> np.ndarray:
        place = np.arange(length)
        second = np.take_along_axis(self._in_order(b, b_size), np.maximum(place - a_size - 1, 0), axis=1)
        return np.where(place < a_size, self._in_order(a, a_size), np.where(place == a_size, PLUS, second))

    def _in_order(self, number: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Digits of numbers (R, W) as they are written, and END after them."""
        place = np.arange(number.shape[1])
        at = np.where(place < size, place if self.least_first else size - 1 - place, place)
        return np.where(place < size, np.take_along_axis(number, at, axis=1), END)


def _number(rng: np.random.Generator, width: int, size: np.ndarray) -> np.ndarray:
    """(R, width) random digits, the least significant first, zeros from the `size` (R, 1) of each number on."""
    place = np.arange(width)
    digits = np.where(place < size, rng.integers(0, BASE, (len(size), width)), 0)
    first = rng.integers(1, BASE, size.shape)
    return np.where((place == size - 1) & (size > 1), first, digits)


def _sum(a: np.ndarray, b: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a + b (R, W), the least significant first, and how many they are, from those of the longer one."""
    total, carry = np.empty_like(a), np.zeros(len(a), dtype=np.int64)
    for place in range(a.shape[1]):
        carry, total[:, place] = divmod(a[:, place] + b[:, place] + carry, BASE)
    return total, size + np.take_along_axis(total, size, axis=1)
