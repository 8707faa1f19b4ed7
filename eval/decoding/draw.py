"""Sampling as a processor, whose randomness depends on a seed and on each row's own tokens, not on the batch.

Gumbel-max: argmax of log p + g, with g = −log(−log u), is a draw from p. So greedy decoding with it as the last
processor samples, and a sample is the same however rows are batched, and when a killed evaluation goes on.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from riverrun.eval.decoding.rows import RowProcessor


class Draw(RowProcessor):
    def __init__(self, seed: int):
        self.seed = seed

    def row(self, tokens: list[int], scores: torch.Tensor) -> torch.Tensor:
        place = [self.seed, crc32(np.asarray(tokens, np.int64).tobytes()), len(tokens)]
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(place)))
        return scores + torch.from_numpy(rng.gumbel(size=len(scores))).to(scores)


@dataclass(frozen=True)
class SampleOptions:
    """softmax(logits / temperature), cut to the `top_k` likeliest tokens (0: all), to the fewest that make up `top_p`,
    and to those at least `min_p` times as likely as the likeliest.

    Raises:
        ValueError: a temperature that is not positive, or shares outside [0, 1].
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(
                f"sample needs temperature > 0, top_k ≥ 0, 0 < top_p ≤ 1 and 0 ≤ min_p ≤ 1, not temperature="
                f"{self.temperature}, top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}"
            )

    def cuts(self) -> LogitsProcessorList:
        found = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            found.append(MinPLogitsWarper(self.min_p))
        return found


@dataclass(frozen=True)
class TypicalOptions:
    """Locally typical sampling (arXiv 2202.00666): the tokens whose surprisal is nearest the entropy, up to a
    probability of `mass`.

    Raises:
        ValueError: a mass outside (0, 1), or a temperature that is not positive.
    """

    mass: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.mass < 1 and self.temperature > 0):
            raise ValueError(
                f"typical needs 0 < mass < 1 and temperature > 0, not mass={self.mass}, temperature={self.temperature}"
            )

    def cuts(self) -> LogitsProcessorList:
        return LogitsProcessorList([TemperatureLogitsWarper(self.temperature), TypicalLogitsWarper(self.mass)])
