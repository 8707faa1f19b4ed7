"""Regular tasks of the Chomsky suite (Delétang et al. 2022, arXiv 2207.02098) as running results.

The suite asks for one answer at the end. Here the result so far is the target at each position, as in the word problems
of groups: a training signal from the first token on. Scored is the last position. As in the suite, lengths are drawn up
to the training length.
"""

from typing import ClassVar

import numpy as np

from riverrun.eval.studies.task import IGNORED, Batch, Defaults, SequenceTask

MODULUS = 5
PLUS, MINUS, TIMES = range(MODULUS, MODULUS + 3)  # tokens of modular arithmetic, after the digits


class RunningResult(SequenceTask):
    """A small finite state, asked for as it goes."""

    defaults: ClassVar[Defaults] = Defaults(train_length=128, test_lengths=(256, 512), uniform_lengths=True)
    scored = "last"
    num_tokens: ClassVar[int]
    num_answers: ClassVar[int]

    def vocab_size(self, train_length: int) -> int:
        return self.num_tokens

    @property
    def answers(self) -> range:
        return range(self.num_answers)


class Parity(RunningResult):
    """Whether the ones so far are odd in number."""

    name, num_tokens, num_answers = "parity", 2, 2

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        bits = rng.integers(0, 2, (rows, length))
        return Batch(bits, bits.cumsum(1) % 2)


class CycleNavigation(RunningResult):
    """Where one stands on a cycle of 5 after steps of 0, +1 or −1 (tokens 0, 1, 2) from place 0."""

    name, num_tokens, num_answers = "cycle_navigation", MODULUS, MODULUS

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        actions = rng.integers(0, 3, (rows, length))
        return Batch(actions, np.array([0, 1, -1])[actions].cumsum(1) % MODULUS)


class ModularArithmetic(RunningResult):
    """Digits with +, − or × between them; × binds closer. The target at each digit is the value so far modulo 5.

    An expression has an odd number of symbols: an even length gives one less. Values are uniform but for products, that
    make 0 more likely: always answering 0 does somewhat better than `chance`.
    """

    name, num_tokens, num_answers = "modular_arithmetic", MODULUS + 3, MODULUS

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        length -= 1 - length % 2
        inputs = np.empty((rows, length), dtype=np.int64)
        inputs[:, 0::2] = rng.integers(0, MODULUS, (rows, length // 2 + 1))
        inputs[:, 1::2] = rng.integers(PLUS, TIMES + 1, (rows, length // 2))
        targets = np.full_like(inputs, IGNORED)
        done, term = np.zeros(rows, dtype=np.int64), inputs[:, 0]  # the sum of finished terms, the product under way
        targets[:, 0] = term
        for t in range(2, length, 2):
            operator, digit = inputs[:, t - 1], inputs[:, t]
            times = operator == TIMES
            done = np.where(times, done, done + term) % MODULUS
            term = np.where(times, term * digit, np.where(operator == PLUS, digit, -digit)) % MODULUS
            targets[:, t] = (done + term) % MODULUS
        return Batch(inputs, targets)
