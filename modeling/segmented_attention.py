"""Attention of a segment's tokens to what a memory gives for them and to themselves: Titans' memory as a context (MAC,
arXiv 2501.00663, §4.1).

Persistent keys, the memory's reads and the tokens are in one softmax. The paper has the three in a row under a causal
mask. But a read h_j is made by the query of token j: a token i < j that saw it would see the future. So reads are seen
as tokens are, h_j by tokens i ≥ j alone; and only tokens have queries.
"""

import torch
from torch.nn import functional as F

from riverrun.modeling.persistent_attention import prepend


def segmented_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    memory_k: torch.Tensor,
    memory_v: torch.Tensor,
    persistent_k: torch.Tensor | None,
    persistent_v: torch.Tensor | None,
    start: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Of the tokens of one segment of each of n sequences.

    Args:
        q: (n, H, C', d), of C' tokens in a row.
        k, v: (n, H_kv, C, d), of the segment's C tokens. Those after the last query are not seen: they may be padding
            of any finite numbers.
        memory_k, memory_v: (n, H_kv, C, d), of the memory's reads, one a token.
        persistent_k, persistent_v: (H_kv, P, d), P = 0 or None: there are none.
        start: the place in the segment of the first query: 0 if all tokens ask, C − C' if the last ones do; or (n,),
            where sequences are at different places.

    Returns:
        (n, H, C', d)
    """
    kv_heads, C = k.shape[1:3]
    assert memory_k.shape[2] == C, "a read a token"
    assert isinstance(start, torch.Tensor) or start + q.shape[2] <= C, "keys of all that ask"
    seen = _seen(start, q.shape[2], C, 0 if persistent_k is None else persistent_k.shape[1], q.device)
    k, v = prepend(persistent_k, memory_k, k), prepend(persistent_v, memory_v, v)
    # the query heads that share a key head become queries in a row: on CUDA, of the fused kernels that take a mask none
    # takes groups of heads, and the plain one keeps all scores
    R = q.shape[1] // kv_heads
    rows = q.unflatten(1, (kv_heads, R)).flatten(2, 3)  # (n, H_kv, R·C', d)
    y = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen.repeat(1, 1, R, 1))
    return y.unflatten(2, (R, -1)).flatten(1, 2)


def _seen(start: int | torch.Tensor, queries: int, tokens: int, persistent: int, device: torch.device) -> torch.Tensor:
    """(1 or n, 1, C', P + 2C) bool, which of the persistent ones, the reads and the tokens each query sees."""
    first = start[:, None] if isinstance(start, torch.Tensor) else start
    query = (first + torch.arange(queries, device=device)).view(-1, 1, queries, 1)
    causal = torch.arange(tokens, device=device) <= query
    return torch.cat([causal.new_ones(*causal.shape[:3], persistent), causal, causal], dim=-1)
