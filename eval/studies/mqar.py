"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from riverrun.eval.studies.task import IGNORED, Batch, Defaults, SequenceTask


@dataclass(frozen=True)
class MQAR(SequenceTask):
    """Keys with their values in turn, then each key once more somewhere: the value is asked for there.

    A length N holds K pairs, repeated P times in the same order, in its first 2KP positions. The other N − 2KP have
    (N − 2KP) / 2 slots of two tokens, of which each key takes one, drawn without replacement with probability
    p(g) ∝ a (g + 1)^(a − 1): a small `power_a` puts most queries soon after the pairs. The target stands at the key
    itself, as the next token. Keys come from [1, V/2), values from [V/2, V), each without replacement within a row.

    A model that answers with any value it has seen is right in 1 of K cases, well above `chance`, which is a guess
    among all V/2 values.
    """

    name: ClassVar[str] = "mqar"
    # zoology's figure 2: two layers, no MLP, learning rates 10^-4 to 10^-2 in four steps, weight decay 0.1
    defaults: ClassVar[Defaults] = Defaults(
        train_length=64,
        test_lengths=(128, 256),
        layers=2,
        steps=4000,
        learning_rates=(1e-4, 4.64e-4, 2.15e-3, 1e-2),
        weight_decay=0.1,
        swiglu=False,
    )

    vocabulary: int = 8192  # V
    num_kv_pairs: int | None = None  # K at every length; None: a 16th of the length, at least 1
    num_passes: int = 1  # P
    power_a: float = 0.01  # 1 is uniform
    random_non_queries: bool = False  # fill the unused positions with any tokens, keys among them, instead of zeros

    def vocab_size(self, train_length: int) -> int:
        return self.vocabulary

    @property
    def answers(self) -> range:
        return range(self.vocabulary // 2, self.vocabulary)

    def pairs(self, length: int) -> int:
        """K at that length."""
        return self.num_kv_pairs or max(1, length // 16)

    def problems(self, lengths: tuple[int, ...]) -> list[str]:
        found = []
        if self.num_kv_pairs is not None and self.num_kv_pairs < 1:
            found.append(f"mqar.num_kv_pairs={self.num_kv_pairs} must be at least 1, or left out")
        if self.num_passes < 1:
            found.append(f"mqar.num_passes={self.num_passes} must be at least 1")
        if self.power_a <= 0:
            found.append(f"mqar.power_a={self.power_a} must be positive; 1 is uniform")
        if found:
            return found
        for length in lengths:
            K = self.pairs(length)
            least = 2 * K * self.num_passes + 2 * K
            if length % 2 or length < least:
                found.append(f"mqar needs an even length of at least {least} for {K} pairs, not {length}")
            if self.vocabulary % 2 or self.vocabulary // 2 - 1 < K:
                found.append(f"mqar.vocabulary={self.vocabulary} must be even and at least {2 * K + 2} for {K} pairs")
        return found

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        K, half = self.pairs(length), self.vocabulary // 2
        keys = 1 + _distinct(rng, rows, np.ones(half - 1), K)
        values = half + _distinct(rng, rows, np.ones(half), K)
        context = np.tile(np.stack([keys, values], axis=2).reshape(rows, 2 * K), self.num_passes)
        slots = (length - context.shape[1]) // 2
        odds = np.arange(1, slots + 1) ** (self.power_a - 1)
        at = context.shape[1] + 2 * _distinct(rng, rows, odds, K)

        rest = np.zeros((rows, length - context.shape[1]), dtype=np.int64)
        if self.random_non_queries:
            rest[:] = rng.integers(0, self.vocabulary, rest.shape)
        inputs = np.hstack([context, rest])
        np.put_along_axis(inputs, at, keys, axis=1)
        targets = np.full_like(inputs, IGNORED)
        np.put_along_axis(targets, at, values, axis=1)
        return Batch(inputs, targets)


def _distinct(rng: np.random.Generator, rows: int, odds: np.ndarray, count: int) -> np.ndarray:
    """(rows, count) indices, in each row drawn one after the other without replacement with these odds.

    A race: index i arrives after a time drawn from Exp(odds[i]), and the first `count` to arrive have that law.
    """
    times = rng.standard_exponential((rows, len(odds))) / odds
    first = np.argpartition(times, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(times, first, axis=1), axis=1)
    return np.take_along_axis(first, order, axis=1)
