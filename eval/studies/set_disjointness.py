"""Set disjointness (Arora et al. 2024, "Just Read Twice", arXiv 2407.05483): which token is in both sets?"""

from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np

from riverrun.eval.studies.task import IGNORED, TRAIN, Batch, Defaults, SequenceTask, generator

PREFIX, BETWEEN, ANSWER = 1, 2, 3  # 0 pads in the paper; the sets' tokens come after
FIRST_TOKEN = 4
CODE = 1000


def _both_orders(*sizes: tuple[int, int]) -> tuple[int, ...]:
    return tuple(chain.from_iterable((CODE * a + b, CODE * b + a) for a, b in sizes))


TRAIN_SIZES = _both_orders((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256))
TEST_SIZES = _both_orders(
    (1, 32), (4, 32), (4, 128), (16, 256), (4, 256), (16, 512), (4, 512), (8, 768), (16, 768), (4, 768)
)  # fmt: skip


@dataclass(frozen=True)
class SetDisjointness(SequenceTask):
    """`1 A 2 B 3`, and at the 3 the one token that A and B share is the target; no set holds a token twice.

    What must be kept of A until B is there grows with |A|: a causal model does better where the smaller set comes
    first, or where it reads the sets twice: with P passes the input is `1 A 2 B` P times, then `3`.

    A length stands for two sizes, 1000 |A| + |B|. Training draws one of the paper's twelve pairs a step, whatever the
    training length is; that one chooses the learning rate. A and B come from the two halves of the shuffled tokens;
    a random one of A takes a random place of B.
    """

    name: ClassVar[str] = "set_disjointness"
    # the paper's: three learning rates, weight decay 0.1, batches of 128; it trains 90,000 steps of 4 layers, half of
    # them short convolutions
    defaults: ClassVar[Defaults] = Defaults(
        train_length=256 * CODE + 4,
        test_lengths=tuple(sorted(TEST_SIZES)),
        layers=4,
        steps=20_000,
        batch_size=128,
        learning_rates=(1e-4, 5e-4, 8e-4),
        weight_decay=0.1,
    )
    shortest: ClassVar[int] = CODE + 1
    evenly_spaced: ClassVar[bool] = True

    vocabulary: int = 2048
    num_passes: int = 1  # P

    def vocab_size(self, train_length: int) -> int:
        return self.vocabulary

    @property
    def answers(self) -> range:
        return range(FIRST_TOKEN, self.vocabulary)

    def length_label(self, length: int) -> str:
        a, b = divmod(length, CODE)
        return f"{a}+{b}"

    def problems(self, lengths: tuple[int, ...]) -> list[str]:
        found = []
        if self.num_passes < 1:
            found.append(f"set_disjointness.num_passes={self.num_passes} must be at least 1")
        for length in lengths:
            if min(sizes := divmod(length, CODE)) < 1:
                found.append(
                    f"set_disjointness has no length {length}: write two sizes as 1000 |A| + |B|, such as 4016 for "
                    "sets of 4 and 16"
                )
            elif FIRST_TOKEN + 2 * max(sizes) > self.vocabulary:
                found.append(
                    f"set_disjointness.vocabulary={self.vocabulary} must be at least {FIRST_TOKEN + 2 * max(sizes)} "
                    f"for a set of {max(sizes)}"
                )
        return list(dict.fromkeys(found))

    def training_batch(self, seed: int, step: int, rows: int, length: int) -> Batch:
        rng = generator(TRAIN, seed, step)
        return self.sample(rng, rows, int(rng.choice(TRAIN_SIZES)))

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        size_a, size_b = divmod(length, CODE)
        tokens = rng.permuted(np.tile(np.arange(FIRST_TOKEN, self.vocabulary), (rows, 1)), axis=1)
        a, b = tokens[:, :size_a], tokens[:, -size_b:]
        row = np.arange(rows)
        shared = a[row, rng.integers(0, size_a, rows)]
        b[row, rng.integers(0, size_b, rows)] = shared
        one = np.ones((rows, 1), dtype=np.int64)
        once = [PREFIX * one, a, BETWEEN * one, b]
        inputs = np.hstack([*once * self.num_passes, ANSWER * one])
        targets = np.full_like(inputs, IGNORED)
        targets[:, -1] = shared
        return Batch(inputs, targets)
