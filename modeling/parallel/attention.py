"""Softmax attention over shards of rows: heads are moved (Ulysses, arXiv 2309.14509), or keys go round a ring."""

import torch

from riverrun.modeling.layout import Layout
from riverrun.modeling.parallel.collectives import all_to_all
from riverrun.modeling.parallel.ring import ring_attention
from riverrun.modeling.persistent_attention import persistent_attention


@torch.compiler.disable  # what is exchanged depends on each batch's documents, on the host
def context_attention(
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    persistent_k: torch.Tensor | None = None,
    persistent_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of rows that several ranks share, within documents.

    Args:
        layout: of the shard.
        q: (B, H, T, d), of this rank's tokens, turned by their positions.
        k, v: (B, H_kv, T, d).
        window: tokens that a query sees, itself included; None: all of its document up to it.
        persistent_k, persistent_v: (H_kv, P, d), which every query sees (`modeling.persistent_attention`); None: there
            are none. Their gradients are this rank's part: the sum over the ranks is the whole.

    Returns:
        (B, H, T, d)

    Raises:
        ValueError: heads are to be moved and do not divide among the ranks.
    """
    context = layout.context
    assert context is not None
    axis, heads, kv_heads = context.axis, q.shape[1], k.shape[1]
    if not context.connected:
        return persistent_attention(q, k, v, persistent_k, persistent_v, window, context.cu_seqlens, context.longest)
    divides = heads % axis.size == 0 and (kv_heads % axis.size == 0 or axis.size % kv_heads == 0)
    if context.attention == "ulysses" and not divides:
        raise ValueError(
            f"parallel.attention='ulysses' cannot share {heads} heads and {kv_heads} key heads, those of a "
            f"tensor-parallel rank, among parallel.cp={axis.size} ranks: use parallel.attention='ring'"
        )
    if context.attention == "ring" or not divides:
        return ring_attention(q, k, v, window, context, persistent_k, persistent_v)
    if kv_heads % axis.size:  # each rank's queries share one key head, which goes to all ranks that need it
        k, v = (x.repeat_interleave(axis.size // kv_heads, dim=1) for x in (k, v))
    q, k, v = (all_to_all(x, axis, split=1, join=2) for x in (q, k, v))
    if persistent_k is not None and persistent_v is not None:  # every rank has those of all heads
        first = axis.rank * kv_heads // axis.size
        mine = slice(first, first + k.shape[1])
        persistent_k, persistent_v = persistent_k[mine], persistent_v[mine]
    y = persistent_attention(q, k, v, persistent_k, persistent_v, window, context.row_bounds, context.longest)
    return all_to_all(y, axis, split=2, join=1)
