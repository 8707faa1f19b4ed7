"""From shards of the sequence to shards of the heads and back: all-to-all, as in Ulysses (arXiv 2309.14509).

The second way to share long rows: each rank computes some heads of the whole rows. It costs no extra arithmetic, but
moves every token's inputs and outputs, where the recurrences' summaries have a size of their own.
"""

import torch

from riverrun.modeling.parallel.collectives import all_to_all
from riverrun.modeling.parallel.context import Context


def to_heads(x: torch.Tensor, context: Context, dim: int) -> torch.Tensor:
    """x (B, T, …) or (1, B·T, …) with H heads at `dim` → whole rows as an op sees a batch, H / size heads of them."""
    x = all_to_all(x.view(*context.shape, *x.shape[2:]), context.axis, split=dim, join=1)
    return x if context.row_bounds is None else x.flatten(0, 1)[None]


def from_heads(y: torch.Tensor, context: Context, dim: int) -> torch.Tensor:
    """The inverse of `to_heads`."""
    B, T = context.shape
    y = all_to_all(y.view(B, T * context.axis.size, *y.shape[2:]), context.axis, split=1, join=dim)
    return y if context.cu_seqlens is None else y.flatten(0, 1)[None]


def shares_heads(heads: int, moved: int, summary: int, context: Context) -> bool:
    """Whether moving heads takes fewer bytes than gathering summaries, forward, for a rank.

    Args:
        moved: bytes of one token's inputs and outputs, all heads.
        summary: bytes of one row's summary.
    """
    (B, T), size = context.shape, context.axis.size
    return heads % size == 0 and moved * B * T * (size - 1) / size < summary * B * (size - 1)
