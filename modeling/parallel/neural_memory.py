"""Neural memories of rows that several ranks share.

Heads are moved where they divide among the ranks: any memory is then what it is on one. Else a linear memory by the
online rule, whose weights and momentum a shard takes to others by one matrix (as in `modeling.parallel.linear`),
gathers what the shards do; and any other one is handed on from rank to rank, each of which waits for the one before it:
a layer then takes as long as on one rank, but each holds only its shard of the rows.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from riverrun.kernels.neural_memory import Gates, MemoryState, neural_memory
from riverrun.modeling.parallel.collectives import depend
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.heads import from_heads, shares_heads, to_heads
from riverrun.modeling.parallel.mesh import Axis

if TYPE_CHECKING:
    from riverrun.modeling.neural_memory import MemoryInputs, NeuralMemory


@torch.compiler.disable
def context_neural_memory(
    context: Context, memory: "NeuralMemory", inputs: "MemoryInputs", start: MemoryState
) -> torch.Tensor:
    """This rank's part of what `memory` says (B, T, H, V), or (1, B·T, H, V) if documents begin inside rows, and so the
    inputs. `start`: what documents start from, as that of one sequence."""
    H, size = inputs.q.shape[2], context.axis.size
    B, T = context.shape
    if not context.connected:
        state = start.each(lambda x: x.expand(_sequences(context), *x.shape[1:]))
        return memory.run(inputs, state, cu_seqlens=context.cu_seqlens, max_seqlen=T)[0]
    affine = is_affine(memory)
    cheaper = shares_heads(H, *_bytes(inputs, affine, context), context) if affine else H % size == 0
    if context.takes_heads(H, cheaper):
        mine = context.axis.share(H)
        moved = _of_tokens(inputs, lambda x: to_heads(x, context, 2))
        sequences = len(context.bounds) - 1 if context.row_bounds is not None else B
        state = _heads(start, mine).each(lambda x: x.expand(sequences, *x.shape[1:]))
        y, _ = memory.run(moved, state, cu_seqlens=context.row_bounds, max_seqlen=T * size, heads=mine)
        return from_heads(y, context, 2)
    if affine:
        state = _gathered(context, memory, inputs, start)
        return memory.run(inputs, state, cu_seqlens=context.cu_seqlens, max_seqlen=T)[0]
    return _handed_on(context, memory, inputs, start)


def is_affine(memory: "NeuralMemory") -> bool:
    """Whether a shard takes each column of the weights and of the momentum to another by one and the same matrix."""
    o = memory.options
    linear = o.is_linear and o.bias in ("l2", "dot") and o.retention == "none" and o.gates != "channel"
    return linear and o.chunk_size == o.omega_window == 1 and not o.newton_schulz and o.read != "chunk"


def _bytes(inputs: "MemoryInputs", affine: bool, context: Context) -> tuple[int, int]:
    """Of one token's inputs and outputs, and of one row's summary."""
    (H, K), V = inputs.q.shape[2:], inputs.v.shape[-1]
    states = 1 if inputs.gates[0].log_momentum is None else 2
    summary = 4 * H * states * K * (V + (states * K if context.chain else 0))
    return H * (2 * (K + V) + 6) * inputs.q.element_size(), summary


# what each shard does, gathered


def _gathered(context: Context, memory: "NeuralMemory", inputs: "MemoryInputs", start: MemoryState) -> MemoryState:
    """The states that enter the shard's pieces of documents, of a memory that `is_affine`.

    A column of the weights never meets another: so the matrix is what columns of the identity become beside those of
    the values, which are zeros there.
    """
    tail = _of_tokens(inputs, context.tail)
    B, (H, K), V = context.shape[0], tail.q.shape[2:], tail.v.shape[-1]
    momentum = start.momentum is not None
    n = K * (1 + momentum)
    columns = n if context.chain else 0
    passes = context.mask(context.passes[context.axis.rank], start.weights[0].expand(B, H, K, V))
    parts = [start.weights[0], *(start.momentum or ())]
    identity = torch.eye(n, dtype=parts[0].dtype, device=context.device)[:, :columns]
    parts = [
        torch.cat([rows.expand(B, H, K, columns), torch.where(passes, 0, part)], dim=-1)
        for rows, part in zip(identity.split(K), parts)
    ]
    values = torch.cat([tail.v.new_zeros(*tail.v.shape[:-1], columns), tail.v], dim=-1)
    begin = MemoryState((parts[0],), (parts[1],) if momentum else None)
    _, end = neural_memory(
        tail.k, tail.k, values, (parts[0][0],), tail.gates, rule=memory.options.rule, initial_state=begin,
        cu_seqlens=context.tail_seqlens,
    )  # fmt: skip
    both = torch.cat([end.weights[0], *(end.momentum or ())], dim=-2)  # (B, H, n, columns + V)
    transfer = both[..., :columns] if columns else None
    incoming = iter(context.incoming(both[..., columns:], transfer, torch.matmul).split(K, dim=-2))
    entering = [
        _entering(context, fresh, part) for fresh, part in zip([start.weights[0], *(start.momentum or ())], incoming)
    ]
    return MemoryState((entering[0],), (entering[1],) if momentum else None)


# a state handed on


def _handed_on(context: Context, memory: "NeuralMemory", inputs: "MemoryInputs", start: MemoryState) -> torch.Tensor:
    axis, B, S = context.axis, context.shape[0], _sequences(context)
    place = start.weights[0].new_zeros(1, 1)
    flat = torch.cat([*(x.flatten(1) for x in _parts(start)), place], dim=1)  # (1, numbers)
    state = flat.expand(S, -1)
    if any(context.joins[axis.rank]):
        state = _entering(context, flat, _Receive.apply(flat.expand(B, -1), axis))
    split = state.split([x[0].numel() for x in _parts(start)] + [1], dim=1)
    parts = iter(split[:-1])
    place = split[-1][:, 0].detach()
    y, end = memory.run(
        inputs, start.each(lambda x: next(parts).view(S, *x.shape[1:])), place, cu_seqlens=context.cu_seqlens,
        resumable=True,
    )  # fmt: skip
    if any(context.goes_on):
        lengths = context.shape[1] if context.cu_seqlens is None else context.cu_seqlens.diff()
        place = ((place + lengths) % memory.options.chunk_size)[:, None]
        flat = torch.cat([*(x.flatten(1) for x in _parts(end)), place], dim=1)
        y = depend(y, _Send.apply(context.of_last(flat), axis))
    return y


class _Receive(torch.autograd.Function):
    """From the rank before, into the place of `x`, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _receive(x, axis, axis.rank - 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        _send(grad, ctx.axis, ctx.axis.rank - 1)
        return torch.zeros_like(grad), None


class _Send(torch.autograd.Function):
    """To the rank after, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis, ctx.like = axis, x.new_empty(()).expand(x.shape)
        _send(x, axis, axis.rank + 1)
        return x.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _receive(ctx.like, ctx.axis, ctx.axis.rank + 1), None


def _send(x: torch.Tensor, axis: Axis, to: int) -> None:
    assert axis.group is not None
    dist.send(x.contiguous(), dist.get_global_rank(axis.group, to), group=axis.group)


def _receive(like: torch.Tensor, axis: Axis, source: int) -> torch.Tensor:
    assert axis.group is not None
    x = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dist.recv(x, dist.get_global_rank(axis.group, source), group=axis.group)
    return x


# states and inputs by their tensors


def _entering(context: Context, fresh: torch.Tensor, incoming: torch.Tensor) -> torch.Tensor:
    """What the shard's S pieces start from: `incoming` (B, …) where a row's first goes on with a document, else `fresh`
    (1, …)."""
    joins = context.mask(context.joins[context.axis.rank], incoming)
    first = torch.where(joins, incoming, fresh)
    if context.cu_seqlens is None:
        return first
    return fresh.expand(_sequences(context), *fresh.shape[1:]).index_copy(0, context.first, first)


def _sequences(context: Context) -> int:
    return context.shape[0] if context.cu_seqlens is None else len(context.cu_seqlens) - 1


def _parts(state: MemoryState) -> list[torch.Tensor]:
    return [x for part in state if part is not None for x in part]


def _heads(state: MemoryState, mine: slice) -> MemoryState:
    """Some heads of a state: all of its tensors but those of past tokens have them second."""
    past = None if state.past is None else tuple(x[:, :, mine] for x in state.past)
    return state._replace(past=None).each(lambda x: x[:, mine])._replace(past=past)


def _of_tokens(inputs: "MemoryInputs", function: Any) -> "MemoryInputs":
    shared = all(gates is inputs.gates[0] for gates in inputs.gates)
    gates: tuple[Gates, ...] = tuple(g.each(function) for g in (inputs.gates[:1] if shared else inputs.gates))
    others = {n: None if (x := getattr(inputs, n)) is None else function(x) for n in ("q", "k", "v", "delta", "gamma")}
    return inputs._replace(gates=gates * len(inputs.gates) if shared else gates, **others)  # type: ignore[arg-type]
