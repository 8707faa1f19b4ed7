"""Repetition at the end of a sequence, in linear time, by the Z-function of the reversed sequence.

RPG (arXiv 2505.10402) marks neighbours in the suffix array with |SA[i] − SA[i−1]| = LCP[i]. That misses copies which
are no neighbours there, and asks for equality where a run of three copies has LCP = 2 periods. The right test: a
repeat of period p = j − i is any pair i < j with LCP(i, j) ≥ p (`suffix_array`). Only repeats that end here matter to
a decoder, and for those LCP(0, p) of the reversed sequence is its Z-function at p.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """The last `length` symbols have period `period`; two periods at least."""

    period: int
    length: int

    @property
    def count(self) -> int:
        return self.length // self.period


def z_function(x: Sequence[Hashable]) -> list[int]:
    """z[i]: how many symbols from i on equal those from 0 on; z[0] is the length."""
    n = len(x)
    z = [0] * n
    if n:
        z[0] = n
    left = right = 0
    for i in range(1, n):
        k = min(z[i - left], right - i) if i < right else 0
        while i + k < n and x[k] == x[i + k]:
            k += 1
        z[i] = k
        if i + k > right:
            left, right = i, i + k
    return z


def suffix_matches(x: Sequence[Hashable]) -> list[int]:
    """For every i, how many symbols up to and with x[i] equal the last ones of x."""
    return z_function(x[::-1])[::-1]


def trailing_run(x: Sequence[Hashable]) -> Run | None:
    """The longest repeat that ends with x, of the smallest period among those; None without any."""
    z = z_function(x[::-1])
    runs = [Run(p, p + z[p]) for p in range(1, len(x) // 2 + 1) if z[p] >= p]
    return max(runs, key=lambda run: (run.length, -run.period), default=None)
