"""RNNs with dense recurrent matrices over shards of rows: the state is handed on from rank to rank.

There is no other exact way: how the end of a shard depends on its beginning is a matrix of all channels of a head, too
large to compute and to send. So a document over all P shards keeps one rank busy at a time, each way, and this layer
takes as long as on one rank; memory is shared all the same. Ranks whose rows begin with documents of their own start
at once.

No rank waits in a circle. Forward, a rank receives, runs and sends, layer by layer; backward it receives the gradient
from the rank after it, runs back, and sends one to the rank before. Two neighbours exchange in the same order at both
ends, and the first rank, backward the last, waits for nobody. Where activations are recomputed, every rank repeats a
layer's forward part as a whole before its backward part begins: `_Send` sees to that.
"""

from typing import Any

import torch
from torch import distributed as dist

from riverrun.kernels.common.shooting import state_dtype
from riverrun.kernels.head_rnn import head_rnn
from riverrun.kernels.head_rnn.cells import CELLS
from riverrun.modeling.parallel.context import Context


def context_head_rnn(context: Context, gates: torch.Tensor, weight: torch.Tensor, cell: str) -> torch.Tensor:
    """`head_rnn` of rows that several ranks share: this rank's h. gates (B, T, G, H, K), or (1, B·T, G, H, K) if
    documents begin inside rows."""
    (B, _), (H, K) = context.shape, gates.shape[3:]
    state = gates.new_zeros(B, len(CELLS[cell].states), H, K, dtype=state_dtype(gates))
    state = _Receive.apply(state, gates, weight, context)
    initial = context.initial(context.only(context.joins[context.axis.rank], state))
    h, final = head_rnn(gates, weight, cell, initial_state=initial, cu_seqlens=context.cu_seqlens)
    return _Send.apply(h, context.of_last(final), context)


class _Receive(torch.autograd.Function):
    """The state that the rank before sends, if any of this rank's rows goes on; its gradient goes back there.

    `gates` and `weight` are there for autograd alone: whichever has a gradient, one must be sent back, for the rank
    before waits for it.
    """

    @staticmethod
    def forward(
        ctx: Any, zeros: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor, context: Context
    ) -> torch.Tensor:
        ctx.context, state = context, zeros.clone()
        if _waits(context, 0):
            dist.recv(state, _neighbour(context, -1), context.axis.group)
        return state

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        if _waits(ctx.context, 0):
            dist.send(grad.contiguous(), _neighbour(ctx.context, -1), ctx.context.axis.group)
        return None, None, None, None


class _Send(torch.autograd.Function):
    """Sends the state at the ends of the rows to the next rank, if any of its rows goes on. Tied to the output h, so
    that the state's gradient is there before the recurrence goes backward.

    It saves the state, and looks it up before it waits, for the sake of recomputation (torch.utils.checkpoint), which
    starts when something saved is looked up, and ends once all that was saved is there again. So the layer's forward
    part, whose states other ranks wait for, neither starts after a gradient that those ranks have yet to send, nor ends
    before the state is sent.
    """

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, state: torch.Tensor, context: Context) -> torch.Tensor:
        ctx.context = context
        ctx.save_for_backward(state)
        if _waits(context, 1):
            dist.send(state.contiguous(), _neighbour(context, 1), context.axis.group)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (state,) = ctx.saved_tensors
        by_state = torch.zeros_like(state)
        if _waits(ctx.context, 1):
            dist.recv(by_state, _neighbour(ctx.context, 1), ctx.context.axis.group)
        return grad, by_state, None


def _waits(context: Context, further: int) -> bool:
    """Whether any row of the rank so much further on goes on with a document of the rank before it."""
    rank = context.axis.rank + further
    return rank < context.axis.size and any(context.joins[rank])


def _neighbour(context: Context, step: int) -> int:
    assert context.axis.group is not None
    return dist.get_global_rank(context.axis.group, context.axis.rank + step)
