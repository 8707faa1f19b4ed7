"""Causal attention within documents and windows, beside persistent keys: learned ones without a position, which every
query of every document sees (the persistent memory of Titans, arXiv 2501.00663, §3.3).

One softmax is over both. It is computed in two blocks, the tokens' own and the persistent one, joined by the logarithms
of their sums: no mask is made, which would grow with the square of the rows.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from riverrun.modeling.attention_block import Block, attend, differentiate, self_attention


def persistent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    persistent_k: torch.Tensor | None,
    persistent_v: torch.Tensor | None,
    window: int | None,
    cu_seqlens: torch.Tensor | None,
    longest: int,
) -> torch.Tensor:
    """Of tokens that attend to themselves.

    Args:
        q: (B, H, T, d), k and v: (B, H_kv, T, d).
        persistent_k, persistent_v: (H_kv, P, d), P = 0 or None: there are none.
        window: tokens that a query sees, itself included; None: all of its document up to it.
        cu_seqlens: (S + 1,) int32 bounds of documents over the B·T tokens; None: each row is one.
        longest: no document has more tokens.

    Returns:
        (B, H, T, d)
    """
    if persistent_k is None or not persistent_k.shape[1]:
        return self_attention(q, k, v, window, cu_seqlens, longest)
    return _join(q, k, v, persistent_k, persistent_v, Block(0, window, cu_seqlens, min(longest, q.shape[2])))


def masked_persistent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    persistent_k: torch.Tensor | None,
    persistent_v: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Of T tokens that follow cached ones, all S of which k and v (B, H_kv, S, d) are of.

    Args:
        mask: (B, 1, T, S) bool, True where a query may look (`Layout.mask`); None: everywhere.
    """
    tokens = k.shape[2]
    k, v = prepend(persistent_k, k), prepend(persistent_v, v)
    if mask is not None:
        mask = F.pad(mask, (k.shape[2] - tokens, 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def prepend(persistent: torch.Tensor | None, *others: torch.Tensor) -> torch.Tensor:
    """(H_kv, P, d), the same for all rows, and others (B, H_kv, S, d) in a row → (B, H_kv, P + S + …, d)"""
    before = [] if persistent is None else [_of_rows(persistent, others[0])]
    return torch.cat([*before, *others], dim=2)


@torch.compiler.disable  # how much is seen of what depends on each batch's documents
def _join(*args: Any) -> torch.Tensor:
    return _Persistent.apply(*args)


class _Persistent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        persistent_k: torch.Tensor,
        persistent_v: torch.Tensor,
        own: Block,
    ) -> torch.Tensor:
        out, log_z = attend_beside(q, k, v, persistent_k, persistent_v, own)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, persistent_k, persistent_v, out, log_z)
        ctx.own = own
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, persistent_k, persistent_v, out, log_z = ctx.saved_tensors
        by_q, by_k, by_v, *by_persistent = differentiate_beside(
            grad, q, k, v, persistent_k, persistent_v, out, log_z, ctx.own
        )
        return by_q.to(q.dtype), by_k.to(k.dtype), by_v.to(v.dtype), *by_persistent, None


# for other joins too (`modeling.parallel.ring`)


def attend_beside(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    persistent_k: torch.Tensor | None,
    persistent_v: torch.Tensor | None,
    own: Block,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend` does, of a softmax over persistent keys too, if there are any; both in the logarithm's type."""
    out, log_z = attend(q, k, v, own)
    out = out.to(log_z.dtype)
    if (shown := _shown(q, persistent_k, persistent_v)) is not None:
        merge(out, log_z, *attend(q, *shown))
    return out, log_z


def differentiate_beside(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    persistent_k: torch.Tensor | None,
    persistent_v: torch.Tensor | None,
    out: torch.Tensor,
    log_z: torch.Tensor,
    own: Block,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `differentiate` does, the gradient of q in the logarithm's type, and those of the persistent keys and values:
    from all rows, None if there are none."""
    by_q, by_k, by_v = differentiate(grad, q, k, v, out, log_z, own)
    by_q = by_q.to(log_z.dtype)
    if (shown := _shown(q, persistent_k, persistent_v)) is None:
        return by_q, by_k, by_v, None, None
    keys, values, block = shown
    more, by_keys, by_values = differentiate(grad, q, keys, values, out, log_z, block)
    by_q += more
    return by_q, by_k, by_v, by_keys.sum(0, dtype=log_z.dtype), by_values.sum(0, dtype=log_z.dtype)


def merge(out: torch.Tensor, log_z: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
    """Another part of the softmax joins, in place."""
    total = torch.logaddexp(log_z, z)
    out.mul_((log_z - total).exp()[..., None]).add_(y * (z - total).exp()[..., None])
    log_z.copy_(total)


def _shown(
    q: torch.Tensor, persistent_k: torch.Tensor | None, persistent_v: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, Block] | None:
    """The persistent keys and values of q's rows, and that every query sees them all; None: there are none."""
    if persistent_k is None or persistent_v is None or not persistent_k.shape[1]:
        return None
    # as far back as they are many, so that the first query sees the last one, and without a window
    return _of_rows(persistent_k, q), _of_rows(persistent_v, q), Block(persistent_k.shape[1], None)


def _of_rows(persistent: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(H_kv, P, d) → (B, H_kv, P, d), in the type that the attention is in."""
    return persistent.to(like.dtype).expand(len(like), -1, -1, -1)
