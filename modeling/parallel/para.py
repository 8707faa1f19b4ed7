"""ParaGRU and ParaLSTM over shards of rows: multiple shooting, whose unknowns are the states that enter the shards.

A nonlinear shard turns the state g that enters it into Φ(g). Each pass computes Φ of all shards at once at the present
g, and how it depends on g, A = ∂Φ/∂g, a number or a 2 × 2 block a channel; then all ranks fold the affine recurrence
g' = Φ + A (g_new − g) from left to right. Whatever the cell, each pass makes at least one more shard of a chain exact,
so as many passes as shards that a document passes through on its way are always enough, and for two ranks that is none:
the first shard's state does not depend on anything before it.

The gradient is exact, and parallel as well: at the solution dg_{r+1} = dΦ_r + A_r dg_r, which is affine again.

Cells mostly forget long before a shard is over. So where shards are long, the last BURN_IN tokens of each are asked
first whether anything before them still shows in the state that leaves, on any rank: if not, to within the state's
rounding, they are all that has to be computed twice. The host waits for that answer, as for the next.

A chain of more than PASSES shards stops early if the states that enter have settled: the largest change is a number
that all ranks see alike. A document over all of P shards and cells that do not settle take P − 2 passes and the last
one: the work of handing the state on from rank to rank, and as exact.
"""

from collections.abc import Callable

import torch
from torch import distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from riverrun.kernels.common.shooting import record_solve, state_dtype
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm
from riverrun.modeling.parallel.context import Context

PASSES = 2  # before the last one, that are made without asking whether they were needed
BURN_IN, WORTH = 1024, 4  # tokens that cells may forget everything before; how many times as many make it worth trying
FORGOTTEN = 2.0**-24  # of a state, what is less than its rounding

Solve = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def context_para_gru(
    context: Context, gates: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """`para_gru` of rows that several ranks share: this rank's h. gates (B, T, 3, D), or (1, B·T, 3, D) if documents
    begin inside rows."""

    def solve(gates: torch.Tensor, initial: torch.Tensor, cu_seqlens: torch.Tensor | None):
        h, final = para_gru(
            gates, weight, bias=bias, initial_state=initial[:, 0], cu_seqlens=cu_seqlens, tolerance=tolerance
        )  # fmt: skip
        return h, final[:, None]

    return _shared("para_gru", context, solve, gates, 1, tolerance)


def context_para_lstm(
    context: Context,
    gates: torch.Tensor,
    weight: torch.Tensor,
    peephole: torch.Tensor,
    *,
    bias: torch.Tensor,
    tolerance: float,
) -> torch.Tensor:
    """`para_lstm` of rows that several ranks share: this rank's h. gates (B, T, 3, D), or (1, B·T, 3, D) if documents
    begin inside rows."""

    def solve(gates: torch.Tensor, initial: torch.Tensor, cu_seqlens: torch.Tensor | None):
        return para_lstm(
            gates, weight, peephole, bias=bias, initial_state=initial, cu_seqlens=cu_seqlens, tolerance=tolerance
        )  # fmt: skip

    return _shared("para_lstm", context, solve, gates, 2, tolerance)


def _shared(name: str, context: Context, solve: Solve, gates: torch.Tensor, K: int, tolerance: float) -> torch.Tensor:
    """h, from a solver of K state vectors a channel: (gates, initial (S, K, D), cu_seqlens) → h, final (S, K, D)."""
    (B, _), D = context.shape, gates.shape[-1]
    enter = gates.new_zeros(B, K, D, dtype=state_dtype(gates))
    if context.connected:
        forgetful = None
        if context.longest_tail > WORTH * BURN_IN:
            forgetful = _of_recent(name, context, solve, gates, enter)
        enter = forgetful if forgetful is not None else _shoot(name, context, solve, gates, enter, tolerance)
    return solve(gates, context.initial(enter), context.cu_seqlens)[0]


def _of_recent(
    name: str, context: Context, solve: Solve, gates: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor | None:
    """The states that enter, from the last tokens of each shard alone; None if any rank's cells remember more."""
    recent, bounds = context.recent(gates, BURN_IN)
    cut = [end - begin > BURN_IN for begin, end in context.last_pieces]
    depends = [c or p for c, p in zip(cut, context.passes[context.axis.rank])]
    _, A = _linearise(solve, recent, zeros, bounds, context.mask(depends, zeros), steep=True)
    remembered = _largest(A, context)
    if remembered > FORGOTTEN:
        return None
    record_solve(f"{name}_over_ranks", 1, remembered, True)
    return context.incoming(solve(recent, zeros, bounds)[1], None)


def _shoot(
    name: str, context: Context, solve: Solve, gates: torch.Tensor, enter: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """The states that enter, from whole shards."""
    tail, bounds, passes = (
        context.tail(gates),
        context.tail_seqlens,
        context.mask(context.passes[context.axis.rank], enter),
    )
    for n in range(context.chain):
        before, start = enter, torch.where(passes, enter, 0)
        end, A = _linearise(solve, tail, start, bounds, passes)
        enter = _fold(context, end, A, start)
        if n + 1 >= PASSES and context.chain > PASSES:
            change = _largest(enter - before, context)
            settled = change <= tolerance
            if settled or n + 1 == context.chain:
                record_solve(f"{name}_over_ranks", n + 2, change, settled)
                break
    start = torch.where(passes, enter, 0)
    _, end = solve(tail, start, bounds)
    if not context.chain:
        return context.incoming(end, None)
    _, A = _linearise(solve, tail, start, bounds, passes, steep=True)
    slope = _fold(context, end, A, start)
    return _fold(context, end.detach(), _tame(A), start) + (slope - slope.detach())


def _linearise(
    solve: Solve,
    gates: torch.Tensor,
    start: torch.Tensor,
    bounds: torch.Tensor | None,
    depends: torch.Tensor,
    steep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Φ (B, K, D) at `start`, and A (B, K, K, D), zero where the end does not depend on the start; tame slopes for the
    iteration, unless they are to be as `steep` as they are."""
    start = start.detach().requires_grad_()
    # the hooks keep recomputation away from a graph that is gone before the forward pass is over
    with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        _, end = solve(gates.detach(), start, bounds)
        # channels do not mix: the gradient of all channels' sum is every channel's own
        rows = [torch.autograd.grad(e.sum(), start, retain_graph=True)[0] for e in end.unbind(1)]
    A = torch.stack(rows, dim=1).where(depends[:, None], 0)
    return end.detach(), A if steep else _tame(A)


def _fold(context: Context, end: torch.Tensor, A: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return context.incoming(end - _apply(A, start), A, _apply)


def _apply(A: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """(B, K, K, D), (B, K, D) → (B, K, D)"""
    return (A * state[:, None]).sum(2)


def _tame(A: torch.Tensor) -> torch.Tensor:
    """Slopes for the iteration, which needs none to come to the solution, and might run away along steep ones."""
    return torch.nan_to_num(A, 0.0, 0.0, 0.0).clamp(-1, 1)


def _largest(change: torch.Tensor, context: Context) -> float:
    """Of all ranks; infinite where it is not finite."""
    largest = change.abs().amax().nan_to_num(torch.inf, torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=context.axis.group)
    return largest.item()
