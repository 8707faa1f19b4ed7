"""Repeats by suffix and longest-common-prefix arrays: RPG's own tools, with the right test; the reference for `tandem`.

Kasai et al. 2001 for the LCP array. O(n log² n), plain Python: for tests and short sequences.
"""

from collections.abc import Sequence
from itertools import pairwise


def suffix_array(x: Sequence[int]) -> list[int]:
    """Starts of the suffixes in lexicographic order, by doubling the length compared."""
    order, rank, width = sorted(range(len(x)), key=x.__getitem__), list(x), 1
    while width < 2 * len(x):

        def key(i: int, rank: list[int] = rank, width: int = width) -> tuple[int, int, int]:
            has_more = i + width < len(x)
            return rank[i], has_more, rank[i + width] if has_more else 0

        order.sort(key=key)
        ranks = [0] * len(x)
        for before, i in pairwise(order):
            ranks[i] = ranks[before] + (key(before) < key(i))
        rank, width = ranks, 2 * width
    return order


def lcp_array(x: Sequence[int], order: Sequence[int]) -> list[int]:
    """lcp[i]: the common prefix of the suffixes order[i − 1] and order[i]; lcp[0] = 0."""
    rank = [0] * len(x)
    for place, start in enumerate(order):
        rank[start] = place
    lcp, k = [0] * len(x), 0
    for start in range(len(x)):
        if rank[start] == 0:
            k = 0
            continue
        other = order[rank[start] - 1]
        while start + k < len(x) and other + k < len(x) and x[start + k] == x[other + k]:
            k += 1
        lcp[rank[start]] = k
        k = max(k - 1, 0)
    return lcp


class CommonPrefixes:
    """LCP(i, j) of any two suffixes: the least entry of the LCP array between their ranks."""

    def __init__(self, x: Sequence[int]):
        order = suffix_array(x)
        self.lcp = lcp_array(x, order)
        self.rank = [0] * len(x)
        for place, start in enumerate(order):
            self.rank[start] = place

    def __call__(self, i: int, j: int) -> int:
        low, high = sorted((self.rank[i], self.rank[j]))
        return min(self.lcp[low + 1 : high + 1])


def tandem_repeats(x: Sequence[int]) -> set[tuple[int, int]]:
    """All (start i, period p) with two equal copies of length p side by side from i on: LCP(i, i + p) ≥ p."""
    common, n = CommonPrefixes(x), len(x)
    return {(i, p) for i in range(n) for p in range(1, (n - i) // 2 + 1) if common(i, i + p) >= p}
