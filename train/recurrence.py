"""How deep each micro batch of a step goes, in models with recurrent depth (`[model.depth]`).

All rows of a micro batch get the same n iterations without gradient and k with it, drawn from the model's
`RecurrenceDistribution`. The ranks of a step draw alike, or they would wait for the deepest (3 times the mean for 64
ranks at r̄ = 32), and hang where they meet within an iteration: a draw is a function of the recipe's seed, of the
step's place in the order of data, of the micro batch and of how many there are, and nothing is exchanged.

The M micro batches of a step share out the distribution: micro batch m has the quantile (π(m) + u) / M, with a random
permutation π and u uniform in [0, 1). Each is distributed as if drawn alone, but steps cost nearly the same, and the
gradient's mean over depths varies less.

With `train.recurrence.ramp_steps`, r̄ − k̄ and k̄ grow linearly over the first steps, from about one, as in Huginn's
code; McLeish et al. (2025, arXiv 2511.07384) ramp over the first quarter of a run.
"""

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from riverrun.modeling.depth.counts import RecurrenceDistribution, Steps
from riverrun.modeling.depth.options import DepthOptions
from riverrun.train.config import RecurrenceConfig

DRAW = zlib.crc32(b"recurrence counts")

_distribution = lru_cache(maxsize=64)(RecurrenceDistribution)


class Recurrence:
    """Args:
    depth: of the model.
    seed: of the recipe.
    """

    def __init__(self, depth: DepthOptions, config: RecurrenceConfig, seed: int):
        self.depth, self.config, self.seed = depth, config, seed
        self.row_keys = RowKeys(seed)

    def distribution(self, place: int) -> RecurrenceDistribution:
        """What the step at `place` draws from."""
        share = min(1.0, (place + 1) / max(1, self.config.ramp_steps))
        graded = max(1, math.ceil(share * self.depth.backprop_depth))
        mean = max(1, graded + math.ceil(share * (self.depth.mean_recurrence - self.depth.backprop_depth)))
        return _distribution(replace(self.depth, mean_recurrence=mean, backprop_depth=graded))

    def steps(self, place: int, micro_batches: int) -> list[Steps]:
        """(n, k) of every micro batch of the step at `place` in the order of data."""
        rng = np.random.default_rng([self.seed, DRAW, place])
        quantiles = (rng.permutation(micro_batches) + rng.random(micro_batches)) / micro_batches
        found = self.distribution(place)
        return [found.split(found.quantile(u)) for u in quantiles]


class RowKeys:
    """What a model draws from in training for each row, (B,) int64, by their numbers in the whole order of rows:
    initial states, or offsets of places. `seed` is the recipe's."""

    def __init__(self, seed: int):
        digest = hashlib.blake2b(f"initial states {seed}".encode(), digest_size=8).digest()
        self._first = int.from_bytes(digest, "little")

    def __call__(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor([(self._first + number) % 2**63 for number in numbers])
