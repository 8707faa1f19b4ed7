"""Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values of the shards go round, queries stay.

Each rank attends to one shard's keys after another and merges the parts of the softmax (persistent keys, which every
rank has, beside its own shard's); backward, keys and values go round once more, and the gradients that a shard's have
gathered follow a step behind, then go home. They go as far as any query sees: with a window within a shard, that is
one step. Memory grows with the shard, not with the row. For models with fewer heads than ranks: heads that divide are
better moved (`modeling.parallel.attention`).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from riverrun.modeling.attention_block import Block, attend, differentiate
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import Axis
from riverrun.modeling.persistent_attention import attend_beside, differentiate_beside, merge


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    context: Context,
    persistent_k: torch.Tensor | None = None,
    persistent_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention within documents.

    Args:
        q: (B, H, T, d), of this rank's shard of every row.
        k, v: (B, H_kv, T, d).
        window: tokens that a query sees, itself included; None: all of its document up to it.
        context: the pieces of documents, and what joins them to other ranks'.
        persistent_k, persistent_v: (H_kv, P, d), which every query sees; None: there are none. Their gradients are
            this rank's part: the sum over the ranks is the whole.

    Returns:
        (B, H, T, d)
    """
    own = Block(0, window, context.cu_seqlens, min(context.longest, q.shape[2]))
    return _Ring.apply(q, k, v, persistent_k, persistent_v, own, context)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        persistent_k: torch.Tensor | None,
        persistent_v: torch.Tensor | None,
        own: Block,
        context: Context,
    ) -> torch.Tensor:
        axis, hops = _circle(context, own.window)
        for step, (keys, values) in _turn([k, v], axis, hops):
            if step == 0:
                out, log_z = attend_beside(q, keys, values, persistent_k, persistent_v, own)
                continue
            for rows, queries, seen, block in _blocks(context, step, own.window):
                y, z = attend(q[rows, :, queries], keys[rows, :, seen], values[rows, :, seen], block)
                merge(out[rows, :, queries], log_z[rows, :, queries], y, z)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, persistent_k, persistent_v, out, log_z)
        ctx.own, ctx.context = own, context
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, persistent_k, persistent_v, out, log_z = ctx.saved_tensors
        own, context = ctx.own, ctx.context
        axis, hops = _circle(context, own.window)
        receive = None
        for step, (keys, values) in _turn([k, v], axis, hops):
            if step == 0:
                by_q, by_k, by_v, *by_persistent = differentiate_beside(
                    grad, q, keys, values, persistent_k, persistent_v, out, log_z, own
                )
                continue
            sums = [torch.zeros_like(x, dtype=log_z.dtype) for x in (keys, values)]
            for rows, queries, seen, block in _blocks(context, step, own.window):
                grad_q, *others = differentiate(
                    grad[rows, :, queries], q[rows, :, queries], keys[rows, :, seen], values[rows, :, seen],
                    out[rows, :, queries], log_z[rows, :, queries], block,
                )  # fmt: skip
                by_q[rows, :, queries] += grad_q
                for total, part in zip(sums, others):
                    total[rows, :, seen] += part
            if receive is not None:  # what the ranks between have gathered for the same shard
                for total, before in zip(sums, receive()):
                    total += before
            receive = _send(sums, axis, 1 if step < hops else -hops)
        if receive is not None:
            by_k, by_v = (part + others_part for part, others_part in zip((by_k, by_v), receive()))
        return by_q.to(q.dtype), by_k.to(k.dtype), by_v.to(v.dtype), *by_persistent, None, None


# who sees whom: on the host, of all ranks alike


def _farthest(context: Context, row: int, rank: int, window: int | None) -> int:
    """The first token of the row that any token of a rank's first piece of it sees."""
    T = context.shape[1]
    start, begin = row * T * context.axis.size, rank * T
    document = context.bounds[bisect_right(context.bounds, start + begin) - 1] - start
    return document if window is None else max(document, begin - window + 1)


def _circle(context: Context, window: int | None) -> tuple[Axis, int]:
    """The ranks, and how many steps keys have to go at most to be seen by all who see them."""
    (B, T), size = context.shape, context.axis.size
    return context.axis, max(r - _farthest(context, b, r, window) // T for r in range(size) for b in range(B))


def _blocks(context: Context, step: int, window: int | None) -> Iterator[tuple[slice, slice, slice, Block]]:
    """(rows, queries, keys, block) of this rank's queries that see keys of the rank `step` before it: a row's first
    piece of a document, and the last of the other's. Rows that agree come together."""
    (B, T), rank = context.shape, context.axis.rank
    owner = rank - step
    if owner < 0:  # gone past the last rank: keys of the future
        return

    def shared(row: int) -> tuple[int, int]:
        """The first of the keys that are seen; the end of the queries that see any."""
        start = row * T * context.axis.size
        document_end = context.bounds[bisect_right(context.bounds, start + rank * T)] - start - rank * T
        first = max(0, _farthest(context, row, rank, window) - owner * T)
        reach = T if window is None else (owner + 1 - rank) * T - 1 + window
        return first, min(T, document_end, reach)

    for (first, end), rows in groupby(range(B), key=shared):
        found = list(rows)
        if first < T:
            distance = step * T - first
            yield slice(found[0], found[-1] + 1), slice(0, end), slice(first, T), Block(distance, window)


# what goes round


def _turn(tensors: list[torch.Tensor], axis: Axis, hops: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(step, tensors) of this rank, then of that `step` before it; the next ones travel while these are used."""
    for step in range(hops + 1):
        receive = _send(tensors, axis, 1) if step < hops else None
        yield step, tensors
        if receive is not None:
            tensors = receive()


def _send(tensors: list[torch.Tensor], axis: Axis, step: int) -> Callable[[], list[torch.Tensor]]:
    """Starts to send the tensors to the rank `step` further round, and to receive those of the one `step` before;
    returns a function that waits for these."""
    assert axis.group is not None
    sent = [t.contiguous() for t in tensors]
    received = [torch.empty_like(t) for t in sent]
    to, source = (dist.get_global_rank(axis.group, (axis.rank + s) % axis.size) for s in (step, -step))
    transfers = [dist.P2POp(dist.isend, t, to, axis.group) for t in sent]
    transfers += [dist.P2POp(dist.irecv, t, source, axis.group) for t in received]
    requests = dist.batch_isend_irecv(transfers)

    def wait() -> list[torch.Tensor]:
        for request in requests:
            request.wait()
        sent.clear()  # until now they had to live
        return received

    return wait
