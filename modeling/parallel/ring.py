"""Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values of the shards go round, queries stay.

Each rank attends to one shard's keys after another and keeps a running softmax; backward, keys and values go round once
more and take their gradients along, home after a whole turn. Memory grows with the shard, not with the row. For models
with fewer heads than ranks: heads that divide are better moved (`modeling.parallel.attention`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from riverrun.modeling.parallel.mesh import Axis

SCORE_BYTES = 64 * 2**20  # of the scores that are held at a time


def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document: torch.Tensor, window: int | None, axis: Axis
) -> torch.Tensor:
    """Causal attention within documents, of this rank's queries to the keys of all shards.

    Scores and sums are float32 (float64 if `q` is float64).

    Args:
        q: (B, H, T, d), of this rank's shard of every row.
        k, v: (B, H_kv, T, d).
        document: (B, T · size), which document each token of the whole rows belongs to.
        window: tokens that a query sees, itself included; None: all of its document up to it.

    Returns:
        (B, H, T, d)
    """
    heads = k.shape[1]
    out = _Ring.apply(q.unflatten(1, (heads, -1)), k, v, document, window, axis)
    return out.flatten(1, 2)


class _Ring(torch.autograd.Function):
    """q (B, H_kv, R, T, d): R query heads share a key head."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        document: torch.Tensor,
        window: int | None,
        axis: Axis,
    ) -> torch.Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape, dtype=dtype)
        log_z = q.new_full(q.shape[:-1], -torch.inf, dtype=dtype)
        for owner, (keys, values) in _turn(axis, [k, v]):
            for part, allowed in _parts(q, owner, document, window, axis):
                scores = _scores(q[..., part, :], keys, allowed, dtype)
                new = torch.logaddexp(log_z[..., part], scores.logsumexp(-1))
                seen = new > -torch.inf  # by now; a row of only −inf would give nan
                old = torch.where(seen, (log_z[..., part] - new).exp(), 0)
                p = torch.where(seen[..., None], (scores - new[..., None]).exp(), 0)
                out[..., part, :] = out[..., part, :] * old[..., None] + p @ values[:, :, None].to(dtype)
                log_z[..., part] = new
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, document, out, log_z)
        ctx.window, ctx.axis = window, axis
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, document, out, log_z = ctx.saved_tensors
        dtype, scale = log_z.dtype, q.shape[-1] ** -0.5
        grad = grad.to(dtype)
        mean = (grad * out.to(dtype)).sum(-1, keepdim=True)
        by_q = torch.zeros_like(grad)
        sums = [torch.zeros_like(t, dtype=dtype) for t in (k, v)]
        for owner, (keys, values, by_k, by_v) in _turn(ctx.axis, [k, v, *sums], home=True):
            for part, allowed in _parts(q, owner, document, ctx.window, ctx.axis):
                queries, of_part = q[..., part, :].to(dtype), grad[..., part, :]
                p = (_scores(q[..., part, :], keys, allowed, dtype) - log_z[..., part, None]).exp()
                by_v += (p.mT @ of_part).sum(2)
                by_scores = p * (of_part @ values[:, :, None].to(dtype).mT - mean[..., part, :]) * scale
                by_q[..., part, :] += by_scores @ keys[:, :, None].to(dtype)
                by_k += (by_scores.mT @ queries).sum(2)
            if owner == (ctx.axis.rank + 1) % ctx.axis.size:  # the last of the turn: these are on their way home
                sums = [by_k, by_v]
        by_k, by_v = _pass_round(sums, ctx.axis)()
        return by_q.to(q.dtype), by_k.to(k.dtype), by_v.to(v.dtype), None, None, None


def _scores(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, H_kv, R, t, T), −inf where a query may not look."""
    scores = q.to(dtype) @ k[:, :, None].to(dtype).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed[:, None, None], -torch.inf)


def _parts(
    q: torch.Tensor, owner: int, document: torch.Tensor, window: int | None, axis: Axis
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The queries in parts, and which of the owner's keys each may look at, (B, t, T); none where none may."""
    B, heads, R, T, _ = q.shape
    nearest = (axis.rank - owner - 1) * T + 1  # from the first query back to the owner's last key
    if owner > axis.rank or (window is not None and owner < axis.rank and nearest >= window):
        return
    size = max(1, SCORE_BYTES // (4 * B * heads * R * T))
    key = owner * T + torch.arange(T, device=q.device)
    for start in range(0, T, size):
        part = slice(start, min(start + size, T))
        query = axis.rank * T + torch.arange(part.start, part.stop, device=q.device)[:, None]
        allowed = key <= query
        if window is not None:
            allowed = allowed & (query - key < window)
        same = document[:, query] == document[:, key][:, None]
        yield part, allowed & same


def _turn(axis: Axis, tensors: list[torch.Tensor], home: bool = False) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(whose, tensors) of this rank, then of the one before it, and so on. The next ones travel while these are used;
    with `home`, the third and fourth may be added to meanwhile, and travel after that."""
    for step in range(axis.size):
        last = step == axis.size - 1
        receive = _pass_round(tensors[:2], axis) if not last else None
        yield (axis.rank - step) % axis.size, tensors
        if receive is not None:
            sums = _pass_round(tensors[2:], axis)() if home else []
            tensors = [*receive(), *sums]


def _pass_round(tensors: list[torch.Tensor], axis: Axis):
    """Starts to send the tensors to the next rank of the ring, and to receive those of the one before; returns a
    function that waits for these."""
    assert axis.group is not None
    tensors = [t.contiguous() for t in tensors]
    received = [torch.empty_like(t) for t in tensors]
    to, source = (dist.get_global_rank(axis.group, (axis.rank + step) % axis.size) for step in (1, -1))
    transfers = [dist.P2POp(dist.isend, t, to, axis.group) for t in tensors]
    transfers += [dist.P2POp(dist.irecv, t, source, axis.group) for t in received]
    requests = dist.batch_isend_irecv(transfers)

    def wait() -> list[torch.Tensor]:
        for request in requests:
            request.wait()
        return received

    return wait
