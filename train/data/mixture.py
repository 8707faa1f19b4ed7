"""Weighted mixtures of stores: which row each sample of the training order is."""

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction

from riverrun.train.data.order import Permutation
from riverrun.train.data.packing import PackedRows, Row

PERIOD = 1000  # weights are rounded to multiples of 1/PERIOD


class Mixture:
    """An endless sequence of rows from several stores in fixed proportions.

    The first i samples have the exact proportions to within one row a store, for every i. A sample is the next row of
    its store's own order: each store is walked without repeats, in a new order (seed, store, epoch) every time it has
    been used up. Everything is a pure function of (seed, i), in constant time and memory.

    Raises:
        ValueError: a weight below 1/1000 of the total.
    """

    def __init__(self, sources: Sequence[PackedRows], weights: Sequence[float], seed: int):
        assert sources and len(sources) == len(weights)
        self.sources, self.seed = sources, seed
        self.pattern = _pattern(weights)
        # for each place of the pattern, how many samples its store had before; per store, its places
        self.places = [[p for p, s in enumerate(self.pattern) if s == source] for source in range(len(sources))]
        self._orders: dict[tuple[int, int], Permutation] = {}

    def locate(self, i: int) -> tuple[int, int]:
        """The store and the row of sample `i`."""
        cycle, place = divmod(i, len(self.pattern))
        source = self.pattern[place]
        places = self.places[source]
        nth = cycle * len(places) + bisect.bisect_left(places, place)
        epoch, offset = divmod(nth, len(self.sources[source]))
        return source, self._order(source, epoch)(offset)

    def __getitem__(self, i: int) -> Row:
        source, row = self.locate(i)
        return self.sources[source][row]

    def pairs(self, i: int) -> int:
        """See `PackedRows.pairs`; of sample `i`."""
        source, row = self.locate(i)
        return self.sources[source].pairs(row)

    def epochs(self, samples: int) -> list[float]:
        """How often each store has been walked after that many samples."""
        cycles, place = divmod(samples, len(self.pattern))
        used = [cycles * len(places) + bisect.bisect_left(places, place) for places in self.places]
        return [n / len(source) for n, source in zip(used, self.sources)]

    def _order(self, source: int, epoch: int) -> Permutation:
        key = (source, epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source}  # one epoch at a time
            self._orders[key] = Permutation(len(self.sources[source]), self.seed, source, epoch)
        return self._orders[key]


def _pattern(weights: Sequence[float]) -> list[int]:
    """One period of the assignment of samples to stores.

    Of the stores that are behind their share, the one that would first be a whole row behind is served: no store is
    ever a row away from its share (Tijdeman, The chairman assignment problem, 1980). Serving the one furthest behind
    is not enough with many stores.
    """
    total = sum(weights)
    shares = [Fraction(round(PERIOD * w / total), PERIOD) for w in weights]
    if not all(shares):
        raise ValueError(f"a data.train weight is less than 1/{PERIOD} of the total: raise it, or drop that store")
    shares = [share / sum(shares) for share in shares]
    length = math.lcm(*(share.denominator for share in shares))
    slack = Fraction(1, max(2, 2 * len(shares) - 2))
    pattern, used = [], [0] * len(shares)
    for i in range(1, length + 1):
        behind = [share * i - n for share, n in zip(shares, used)]
        due = [s for s, rows in enumerate(behind) if rows >= slack]
        source = min(due, key=lambda s: ((1 - slack - behind[s]) / shares[s], s))
        pattern.append(source)
        used[source] += 1
    return pattern
