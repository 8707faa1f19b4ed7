"""What a task of a study is: generated sequences, a pure function of (stream, seed, step), and how they are scored."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

IGNORED = -100  # a target without loss, as in torch
TRAIN, VALIDATION, TEST = range(3)  # streams of random numbers that never meet


class Batch(NamedTuple):
    """inputs: (R, T) tokens; targets: (R, T) the token to predict at each position, already shifted; −100: none."""

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Defaults:
    """The setting of a study of a task where the user gives none.

    Attributes:
        uniform_lengths: each training batch has one length, drawn from the shortest to the training length.
        swiglu: whether a block has a SwiGLU after the mixer.
    """

    train_length: int
    test_lengths: tuple[int, ...]
    layers: int = 1
    width: int = 64
    steps: int = 2000
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    weight_decay: float = 0.0
    uniform_lengths: bool = False
    swiglu: bool = True


@dataclass(frozen=True)
class Task(ABC):
    """A family of problems with one size, the length. The fields of a subclass are its options."""

    __pydantic_config__ = {"extra": "forbid"}

    name: ClassVar[str]
    defaults: ClassVar[Defaults]
    shortest: ClassVar[int] = 1
    evenly_spaced: ClassVar[bool] = False  # on a plot's axis, in their order; else the axis is logarithmic

    @abstractmethod
    def vocab_size(self, train_length: int) -> int:
        """Tokens of a model that is to learn the task up to that length."""

    @property
    @abstractmethod
    def answers(self) -> range:
        """The tokens that can be a target."""

    @property
    def chance(self) -> float:
        """The expected accuracy of a guess drawn uniformly from `answers`."""
        return 1 / len(self.answers)

    def length_label(self, length: int) -> str:
        """A length as tables and plots show it."""
        return f"{length:,}"

    def problems(self, lengths: tuple[int, ...]) -> list[str]:
        """What is impossible about the options with these lengths, the training length first; each with its fix."""
        return [
            f"{self.name} has no sequences of length {n}: the shortest is {self.shortest}"
            for n in lengths
            if n < self.shortest
        ]


class SequenceTask(Task):
    """Tokens in, a token out at some positions.

    `scored` says which targets of a row count for the accuracy; all of them are trained. "last" is for running results,
    where the accuracy at a length should not be an average over all shorter ones.
    """

    scored: ClassVar[Literal["all", "last"]] = "all"

    @abstractmethod
    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """`rows` independent sequences of one length."""

    def batch(self, stream: int, seed: int, step: int, rows: int, length: int) -> Batch:
        """The batch with these coordinates, always the same one."""
        return self.sample(generator(stream, seed, step), rows, length)

    def training_batch(self, seed: int, step: int, rows: int, length: int) -> Batch:
        """A batch of the training length or, in tasks with uniform lengths, of one drawn up to it."""
        rng = generator(TRAIN, seed, step)
        if self.defaults.uniform_lengths:
            length = int(rng.integers(self.shortest, length + 1))
        return self.sample(rng, rows, length)


def generator(stream: int, seed: int, step: int) -> np.random.Generator:
    """Random numbers that depend on these coordinates alone."""
    return np.random.default_rng([stream, seed, step])


def ask(inputs: np.ndarray, answers: np.ndarray, compute: int) -> Batch:
    """Append a `compute` token for each answer; the answer is the target there.

    The causal form of the Chomsky suite's tasks: the model sees the whole input, and never its own answers.

    Args:
        inputs: (R, T).
        answers: (R, A), −100 where nothing is asked.
    """
    asked = np.full_like(answers, compute)
    return Batch(np.hstack([inputs, asked]), np.hstack([np.full_like(inputs, IGNORED), answers]))
