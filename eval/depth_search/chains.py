"""Chains of a model's units, and the edits that make one of another.

A chain lists the units that run, in order: layers, or iterations of a recurrent core, one unit that runs again and
again. The identity, such as 0 … L−1, is the model as it is. An edit takes a block of at most k neighbours of a chain
and leaves it out, or runs it up to r times more. It acts on the chain, not on the model: what was repeated can be
repeated again, as part of another block too. The paper leaves open how long chains may grow; here it is twice the
model.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from random import Random
from typing import NamedTuple, TypeVar

Chain = tuple[int, ...]
Chains = TypeVar("Chains", list[Chain], tuple[Chain, ...])

GROWTH = 2  # times the identity, at most


@dataclass(frozen=True)
class Space:
    """The chains that edits of blocks of up to `k` units and `r` repetitions lead to, from the identity.

    Attributes:
        core: the unit that is an iteration of a recurrent core; None: there is none.
    """

    identity: Chain
    k: int = 4
    r: int = 4
    core: int | None = None

    @property
    def num_units(self) -> int:
        """That are different."""
        return max(self.identity) + 1

    @property
    def longest(self) -> int:
        return GROWTH * len(self.identity)

    @property
    def iterations(self) -> int:
        """Of the core, in the identity."""
        return sum(unit == self.core for unit in self.identity)

    def with_iterations(self, number: int) -> Chain:
        """The identity with so many instead."""
        assert self.core is not None
        first = self.identity.index(self.core)
        return self.identity[:first] + number * (self.core,) + self.identity[first + self.iterations :]


class Neighbours(NamedTuple):
    """What one edit makes of a chain, each chain once."""

    shorter: tuple[Chain, ...]
    longer: tuple[Chain, ...]


@lru_cache(maxsize=64)  # random chains start from the identity again and again
def neighbours(space: Space, chain: Chain) -> Neighbours:
    shorter, longer = dict[Chain, None](), dict[Chain, None]()
    for size in range(1, min(space.k, len(chain)) + 1):
        for start in range(len(chain) - size + 1):
            end = start + size
            if size < len(chain):
                shorter[chain[:start] + chain[end:]] = None
            for times in range(1, min(space.r, (space.longest - len(chain)) // size) + 1):
                longer[chain[:end] + times * chain[start:end] + chain[end:]] = None
    return Neighbours(tuple(shorter), tuple(longer))


def draw_kind(rng: Random, shorter: Chains, longer: Chains) -> Chains:
    """One of the two, with equal chances where neither is empty: there are r times as many repetitions as there are
    blocks to leave out."""
    return shorter if shorter and (not longer or rng.random() < 0.5) else longer


def random_chain(space: Space, rng: Random) -> Chain:
    """One edit of the identity or several, each further one with probability 1/2."""
    chain = space.identity
    while True:
        chain = rng.choice(draw_kind(rng, *neighbours(space, chain)))
        if rng.random() < 0.5:
            return chain


def in_words(chain: Chain) -> str:
    """Such as "0-3 5 5-7 8×3": units that follow one another as in the model are written as one, and so are three runs
    or more of the same."""
    pieces: list[list[int]] = []  # first, last, times
    for unit, same in groupby(chain):
        times = len(list(same))
        if times > 2:
            pieces.append([unit, unit, times])
            continue
        for _ in range(times):
            if pieces and pieces[-1][1:] == [unit - 1, 1]:
                pieces[-1][1] = unit
            else:
                pieces.append([unit, unit, 1])
    return " ".join(f"{first}{f'-{last}' * (last > first)}{f'×{times}' * (times > 1)}" for first, last, times in pieces)
