"""Causal attention within documents and windows, without masks, which would grow with the square of the rows: of tokens
to themselves; or of some queries to some keys, in a form that joins with others, with the log of what it divided by.

On CUDA in half precision it is torch's flash kernels; elsewhere plain torch, in parts of the queries, with scores and
sums in float32 (float64 if `q` is float64), also under autocast.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SCORE_BYTES = 64 * 2**20  # of the scores that plain torch holds at a time
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Block:
    """Which of S keys each of T queries sees: none after itself, none of another document. Each sees at least one.

    Attributes:
        distance: tokens from the first key to the first query: 0 where tokens attend to themselves, and S = T; else
            more than that, and all keys are of the queries' document.
        window: tokens that a query sees, itself included; None: all of its document up to it.
        cu_seqlens: (D + 1,) int32 bounds of the documents over B·T tokens that attend to themselves; None: each of the
            B rows is one.
        longest: no document of those has more tokens.
    """

    distance: int
    window: int | None
    cu_seqlens: torch.Tensor | None = None
    longest: int = 0


def self_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    cu_seqlens: torch.Tensor | None,
    longest: int,
) -> torch.Tensor:
    """Of tokens that attend to themselves.

    Args:
        q: (B, H, T, d), k and v: (B, H_kv, T, d).
        window: tokens that a query sees, itself included; None: all of its document up to it.
        cu_seqlens: (S + 1,) int32 bounds of documents over the B·T tokens; None: each row is one.
        longest: no document has more tokens.

    Returns:
        (B, H, T, d)
    """
    T = q.shape[2]
    if cu_seqlens is None and (window is None or window >= T):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
    return _own(q, k, v, Block(0, window, cu_seqlens, min(longest, T)))


@torch.compiler.disable  # how much is seen of what depends on each batch's documents
def _own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block) -> torch.Tensor:
    return _Own.apply(q, k, v, block)


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block) -> torch.Tensor:
        out, log_z = attend(q, k, v, block)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_z)
        ctx.block = block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_z = ctx.saved_tensors
        by_q, by_k, by_v = differentiate(grad, q, k, v, out, log_z, ctx.block)
        return by_q.to(q.dtype), by_k.to(k.dtype), by_v.to(v.dtype), None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, T, d), k and v (B, H_kv, S, d) → the softmax's mean of v (B, H, T, d), and the logarithm of the sum of
    its exponentials (B, H, T)."""
    if _is_flash(q, k, v):
        B, H, T, _ = q.shape
        bounds, options = _flash_options(q, k, block)
        out, log_z, *_ = torch.ops.aten._flash_attention_forward(
            _pack(q), _pack(k), _pack(v), *bounds, 0.0, block.distance == 0, False, **options
        )
        return _unpack(out, B), log_z.view(H, B, T).transpose(0, 1)
    with torch.autocast(q.device.type, enabled=False):
        return _attend(q.unflatten(1, (k.shape[1], -1)), k, v, block)


def differentiate(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_z: torch.Tensor,
    block: Block,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This block's part of the gradients of q, k and v.

    Args:
        grad, out, log_z: of the whole softmax, of which this block is a part.
    """
    if _is_flash(q, k, v):
        B = q.shape[0]
        bounds, options = _flash_options(q, k, block)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        packed_z = log_z.transpose(0, 1).flatten(1).contiguous()  # which the kernel takes for granted
        grads = torch.ops.aten._flash_attention_backward(
            _pack(grad), _pack(q), _pack(k), _pack(v), _pack(out), packed_z, *bounds,
            0.0, block.distance == 0, *no_dropout, **options,
        )  # fmt: skip
        by_q, by_k, by_v = (_unpack(g, B) for g in grads)
        return by_q, by_k, by_v
    with torch.autocast(q.device.type, enabled=False):
        grad, q, out, log_z = (x.unflatten(1, (k.shape[1], -1)) for x in (grad, q, out, log_z))
        return _differentiate(grad, q, k, v, out, log_z, block)


# torch's flash kernels


def _is_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    if not q.is_cuda or q.dtype not in HALF or q.shape[-1] % 8:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, True)
    return torch.backends.cuda.can_use_flash_attention(params)


def _flash_options(q: torch.Tensor, k: torch.Tensor, block: Block):
    """The bounds of the sequences among queries and keys, and their longest; and how far to the left and to the right a
    query sees, −1: without end, counted with the last query of a sequence beside its last key."""
    T, S = q.shape[2], k.shape[2]
    left = -1 if block.window is None else block.window - 1 - block.distance + S - T
    right = 0 if block.distance == 0 else -1
    if block.cu_seqlens is not None:
        bounds = (block.cu_seqlens, block.cu_seqlens, block.longest, block.longest)
    else:
        row = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
        bounds = (row * T, row * S, T, S)
        if left >= 0 and right < 0:
            # beside a left end, flash takes no right end for one at the longest keys' number, which hides keys from the
            # first of many queries: T is out of sight, if that number lets it be
            right, bounds = T, (*bounds[:3], max(S, T + 1))
    return bounds, {"window_size_left": left, "window_size_right": right}


def _pack(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, d) → (B·T, H, d)"""
    return x.transpose(1, 2).flatten(0, 1)


def _unpack(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


# plain torch; q, out and log_z are (B, H_kv, R, T, …): R query heads share a key head


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, log_z = q.new_empty(q.shape, dtype=dtype), q.new_empty(*q.shape[:-1], 1, dtype=dtype)
    for queries, keys, scores in _scores(q, k, block):
        z = scores.logsumexp(-1, keepdim=True)
        _put(log_z, queries, z)
        _put(out, queries, (scores - z).exp() @ v[:, :, keys].to(dtype))
    return out.flatten(1, 2), log_z.squeeze(-1).flatten(1, 2)


def _differentiate(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_z: torch.Tensor,
    block: Block,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, scale = log_z.dtype, q.shape[-1] ** -0.5
    mean = (grad.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    by_q = torch.empty_like(q, dtype=dtype)
    by_k, by_v = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
    for queries, keys, scores in _scores(q, k, block):
        p = (scores - _part(log_z[..., None], queries)).exp()
        upstream = _part(grad, queries).to(dtype)
        by_v[:, :, keys] += p.mT @ upstream
        by_scores = p * (upstream @ v[:, :, keys].to(dtype).mT - _part(mean, queries)) * scale
        by_k[:, :, keys] += by_scores.mT @ _part(q, queries).to(dtype)
        _put(by_q, queries, by_scores @ k[:, :, keys].to(dtype))
    return by_q.flatten(1, 2), by_k, by_v


def _scores(q: torch.Tensor, k: torch.Tensor, block: Block) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """The queries in parts, the keys that any of a part sees, and their scores (B, H_kv, R·t, s), −inf where unseen."""
    (B, kv_heads, R, T, d), S = q.shape, k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    document = None
    if block.cu_seqlens is not None:
        document = torch.searchsorted(block.cu_seqlens, torch.arange(B * T, device=q.device), right=True).view(B, T)
    size = max(1, SCORE_BYTES // (dtype.itemsize * B * kv_heads * R * S))
    for start in range(0, T, size):
        queries = slice(start, min(start + size, T))
        nearest = block.distance + queries.stop
        farthest = 0 if block.window is None else block.distance + start + 1 - block.window
        keys = slice(max(0, farthest), min(S, nearest))
        scores = _part(q, queries).to(dtype) @ k[:, :, keys].to(dtype).mT * d**-0.5
        back = block.distance + torch.arange(queries.start, queries.stop, device=q.device)[:, None]
        back = back - torch.arange(keys.start, keys.stop, device=q.device)
        unseen = back < 0
        if block.window is not None:
            unseen = unseen | (back >= block.window)
        if document is not None:
            unseen = unseen | (document[:, queries, None] != document[:, None, keys])[:, None, None]
        scores.unflatten(2, (R, -1)).masked_fill_(unseen, -torch.inf)
        yield queries, keys, scores


def _part(x: torch.Tensor, queries: slice) -> torch.Tensor:
    """(B, H_kv, R, T, n) → (B, H_kv, R·t, n)"""
    return x[..., queries, :].flatten(2, 3)


def _put(x: torch.Tensor, queries: slice, part: torch.Tensor) -> None:
    """The inverse of `_part`."""
    x[..., queries, :] = part.unflatten(2, (x.shape[2], -1))
