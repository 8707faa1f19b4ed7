"""What a run watches of its recurrent depth besides what the model notes (`riverrun.modeling.depth.statistics`)."""

import zlib
from collections.abc import Sequence

import torch

from riverrun.modeling.depth.counts import RecurrenceDistribution
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.statistics import note
from riverrun.train.data.packing import Batch

THIRDS = ("depth_loss_low", "depth_loss_mid", "depth_loss_high")


class LossByDepth:
    """Notes the loss of every micro batch under the third of the distribution that its number of iterations is in.

    Args:
        depth: None: nothing is noted, nor where all numbers are the same.
    """

    def __init__(self, depth: DepthOptions | None, leads: bool):
        self.leads = leads
        self.edges: list[int] = []
        if depth is not None and depth.sampling != "fixed":
            self.edges = [RecurrenceDistribution(depth).quantile(u) for u in (1 / 3, 2 / 3)]

    def __call__(self, batch: Batch, sums: torch.Tensor) -> None:
        """
        Args:
            sums: (losses,) this rank's part of the objective's; the first is the cross-entropy of the next token.
        """
        if self.edges and batch.num_steps is not None:
            third = sum(sum(batch.num_steps) > edge for edge in self.edges)
            note(THIRDS[third], sums[0], batch.num_targets if self.leads else 0)


def signature(batches: Sequence[Batch]) -> int:
    """A number by which ranks tell whether they drew alike; sums of 2²⁰ of them are exact in float64."""
    return zlib.crc32(repr([batch.num_steps for batch in batches]).encode())
