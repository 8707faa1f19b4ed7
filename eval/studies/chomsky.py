"""Tasks above the regular ones from the Chomsky suite (Delétang et al. 2022, arXiv 2207.02098).

Trained on lengths drawn from 1 to 40, tested on longer ones. The input is followed by a "compute" token for each token
of the answer, and the answer is the target there.
"""

from typing import ClassVar

import numpy as np

from riverrun.eval.studies.task import IGNORED, Batch, Defaults, SequenceTask, ask

TERMINATOR, POP, PUSH_0, PUSH_1 = range(2, 6)  # of stack manipulation, after the symbols 0 and 1


class ChomskyTask(SequenceTask):
    """Symbols 0 … num_answers − 1 and some more tokens, of which the last one is "compute"."""

    defaults: ClassVar[Defaults] = Defaults(
        train_length=40, test_lengths=(80, 160, 320), layers=2, steps=4000, uniform_lengths=True
    )
    num_tokens: ClassVar[int]
    num_answers: ClassVar[int]

    def vocab_size(self, train_length: int) -> int:
        return self.num_tokens

    @property
    def answers(self) -> range:
        return range(self.num_answers)

    @property
    def compute(self) -> int:
        return self.num_tokens - 1


class ReverseString(ChomskyTask):
    """A string of two symbols, backwards (deterministic context-free)."""

    name, num_tokens, num_answers = "reverse_string", 3, 2

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        x = rng.integers(0, 2, (rows, length))
        return ask(x, x[:, ::-1], self.compute)


class BucketSort(ChomskyTask):
    """A string of five symbols, sorted (context-sensitive; counters suffice)."""

    name, num_tokens, num_answers = "bucket_sort", 6, 5

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        x = rng.integers(0, 5, (rows, length))
        return ask(x, np.sort(x, axis=1), self.compute)


class MissingDuplicate(ChomskyTask):
    """w w with one symbol masked: which one was it (context-sensitive).

    The length is that of w w; an odd one gives one symbol less.
    """

    name, num_tokens, num_answers = "missing_duplicate", 4, 2
    shortest = 2
    MASK: ClassVar[int] = 2

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        w = rng.integers(0, 2, (rows, length // 2))
        doubled = np.hstack([w, w])
        at = rng.integers(0, doubled.shape[1], (rows, 1))
        missing = np.take_along_axis(doubled, at, axis=1)
        np.put_along_axis(doubled, at, self.MASK, axis=1)
        return ask(doubled, missing, self.compute)


class StackManipulation(ChomskyTask):
    """A stack of two symbols, from its bottom, then actions: pop, push 0, push 1. What is on it, from the top?

    (Deterministic context-free.) Popping an empty stack leaves it empty. The answer ends with a terminator; nothing is
    asked after it, where a constant would be right. Of n input tokens, k symbols are the stack, k uniform in 1 … n.
    """

    name, num_tokens, num_answers = "stack_manipulation", 7, 3

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        initial = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
        inputs = np.where(initial, rng.integers(0, 2, (rows, length)), rng.integers(POP, PUSH_1 + 1, (rows, length)))
        stack, size = np.zeros((rows, length), dtype=np.int64), np.zeros(rows, dtype=np.int64)
        for token in inputs.T:
            pushed = token != POP
            symbol = np.where(token < 2, token, token - PUSH_0)
            stack[pushed, size[pushed]] = symbol[pushed]
            size = np.maximum(size + np.where(pushed, 1, -1), 0)
        depth = size[:, None] - 1 - np.arange(length + 1)  # place in the stack that each answer names; −1: its end
        answers = np.take_along_axis(stack, np.maximum(depth, 0), axis=1)
        answers = np.where(depth >= 0, answers, np.where(depth == -1, TERMINATOR, IGNORED))
        return ask(inputs, answers, self.compute)
