"""Chains of a model's layers, and the edits that make one of another.

A chain lists the layers that run, in order; 0 … L−1 is the model as it is. An edit takes a block of at most k
neighbours of a chain and leaves it out, or runs it up to r times more. It acts on the chain, not on the model: what was
repeated can be repeated again, as part of another block too. The paper leaves open how long chains may grow; here it is
twice the model.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from random import Random
from typing import NamedTuple, TypeVar

Chain = tuple[int, ...]
Chains = TypeVar("Chains", list[Chain], tuple[Chain, ...])

GROWTH = 2  # times the model's layers, at most


@dataclass(frozen=True)
class Space:
    """The chains of a model with `num_layers` layers, by edits of blocks of up to `k` layers and `r` repetitions."""

    num_layers: int
    k: int = 4
    r: int = 4

    @property
    def identity(self) -> Chain:
        return tuple(range(self.num_layers))

    @property
    def longest(self) -> int:
        return GROWTH * self.num_layers


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
    """Such as "0-3 5 5 6-11": layers that follow one another as in the model are written as one."""
    runs = [list(run) for _, run in groupby(enumerate(chain), key=lambda item: item[1] - item[0])]
    return " ".join(f"{run[0][1]}" if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)
