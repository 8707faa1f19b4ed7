"""Confidence intervals of 95%."""

from math import sqrt

Z95 = 1.959964  # two-sided quantile of the normal distribution


def wilson(p: float, n: int) -> tuple[float, float]:
    """Of a proportion p of n trials (Wilson 1927)."""
    centre = (p + Z95 * Z95 / (2 * n)) / (1 + Z95 * Z95 / n)
    reach = Z95 / (1 + Z95 * Z95 / n) * sqrt(p * (1 - p) / n + Z95 * Z95 / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)
