"""Confidence intervals of 95%."""

from collections.abc import Sequence
from math import sqrt

import numpy as np

Z95 = 1.959964  # two-sided quantile of the normal distribution


def wilson(p: float, n: int) -> tuple[float, float]:
    """Of a proportion p of n trials (Wilson 1927)."""
    centre = (p + Z95 * Z95 / (2 * n)) / (1 + Z95 * Z95 / n)
    reach = Z95 / (1 + Z95 * Z95 / n) * sqrt(p * (1 - p) / n + Z95 * Z95 / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def bootstrap(values: Sequence[float], resamples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """Of the mean of independent values: percentiles of the means of resampled ones (Efron 1979). Of the differences
    of pairs it is the paired interval."""
    given, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [given[rng.integers(0, len(given), len(given))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def grouped(rows: np.ndarray, groups: int) -> np.ndarray:
    """(D, K) → (min(D, groups), K): sums of rows. Resampling groups of documents is as good and costs less."""
    missing = -len(rows) % groups if len(rows) > groups else 0
    return np.pad(rows, ((0, missing), (0, 0))).reshape(-1, min(len(rows), groups), rows.shape[1]).sum(0)


def resamples(count: int, number: int) -> np.ndarray:
    """(number, count) how often each of `count` rows is drawn; the same in every call."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), number).astype(np.float64)
