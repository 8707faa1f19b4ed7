"""How tensor parallelism cuts a parameter into shards, and puts them together again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from riverrun.modeling.parallel.mesh import Axis


@dataclass(frozen=True)
class Split:
    """Along dimension `dim`, which is made of `blocks` equal parts one after the other: a shard takes its part of each.

    So the keys of a layer with several Householder steps, (step, head, channel) in one dimension, are `blocks` = steps.
    """

    dim: int
    blocks: int = 1

    def shape(self, full: Sequence[int], size: int) -> torch.Size:
        """Of one of `size` shards."""
        return torch.Size(n // size if i == self.dim else n for i, n in enumerate(full))

    def take(self, full: torch.Tensor, axis: Axis) -> torch.Tensor:
        """This rank's shard, a copy."""
        parts = full.unflatten(self.dim, (self.blocks, axis.size, -1)).select(self.dim + 1, axis.rank)
        return parts.flatten(self.dim, self.dim + 1).clone()

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole, from all shards in the order of ranks."""
        parts = [shard.unflatten(self.dim, (self.blocks, -1)) for shard in shards]
        return torch.cat(parts, self.dim + 1).flatten(self.dim, self.dim + 1)


Plan = dict[str, int | Split | None]
"""For each parameter by name the dimension that is split, or a `Split`; None: every rank has the whole of it.

A rank's gradient of a parameter that it has whole comes from its own heads and tokens: it is summed over the ranks.
"""
