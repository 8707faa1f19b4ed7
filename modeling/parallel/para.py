"""ParaGRU and ParaLSTM over shards of rows: multiple shooting, whose unknowns are the states that enter the shards.

A nonlinear shard turns the state g that enters it into Φ(g). Each pass computes Φ of all shards at once at the present
g, and how it depends on g, A = ∂Φ/∂g, a number or a 2 × 2 block a channel; then all ranks fold the affine recurrence
g' = Φ + A (g_new − g) from left to right. Whatever the cell, each pass makes at least one more shard of a chain exact,
so as many passes as shards that a document passes through on its way are always enough, and for two ranks that is none:
the first shard's state does not depend on anything before it.

The gradient is exact, and parallel as well: at the solution dg_{r+1} = dΦ_r + A_r dg_r, which is affine again.

Cells mostly forget long before a shard is over. So where shards are long, the states that enter are first made of the
last BURN_IN tokens of each, and these are asked whether anything before them still shows in the state that leaves, on
any rank: if not, to within the state's rounding, they are all that has to be computed twice. The host waits for that
answer, together with the check below, when it has also launched what comes after: the GPU does not wait for it.

A chain of more than PASSES shards stops early if the states that enter have settled: the largest change is a number
that all ranks see alike. A document over all of P shards and cells that do not settle take P − 2 passes and the last
one: the work of handing the state on from rank to rank, and as exact.

Neither slopes at one trajectory nor states that rest prove anything where a cell has several stable states, or is not
contractive. So what either short way gives is checked where it shows: every shard, run from the state that enters it,
must end, to within the tolerance, with the state that enters the next. If any does not, all ranks go on together.
Where activations are recomputed, the same numbers lead all ranks the same way again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed as dist

from riverrun.kernels.common.shooting import record_solve, state_dtype
from riverrun.kernels.common.slope import linearise
from riverrun.kernels.para_gru import para_gru, para_gru_slope
from riverrun.kernels.para_lstm import para_lstm, para_lstm_slope
from riverrun.modeling.parallel.collectives import to_host
from riverrun.modeling.parallel.context import Context

PASSES = 2  # before the last one, that are made without asking whether they were needed
BURN_IN, WORTH = 1024, 4  # tokens that cells may forget everything before; how many times as many make it worth trying
FORGOTTEN = 2.0**-24  # of a state, what is less than its rounding

Solve = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Slope = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Then = Callable[[torch.Tensor], torch.Tensor]


def _itself(h: torch.Tensor) -> torch.Tensor:
    return h


def context_para_gru(
    context: Context,
    gates: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor,
    tolerance: float,
    then: Then = _itself,
) -> torch.Tensor:
    """`para_gru` of rows that several ranks share: what `then` makes of this rank's h.

    Args:
        gates: (B, T, 3, D), or (1, B·T, 3, D) if documents begin inside rows.
        then: is launched before the host waits to hear whether h holds, and again if it did not. No collectives: of
            tensor-parallel ranks, each hears of its own channels.
    """

    def solve(gates: torch.Tensor, initial: torch.Tensor, cu_seqlens: torch.Tensor | None):
        h, final = para_gru(
            gates, weight, bias=bias, initial_state=initial.squeeze(1), cu_seqlens=cu_seqlens, tolerance=tolerance
        )  # fmt: skip
        return h, final.unsqueeze(1)

    def slope(gates: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return para_gru_slope(gates, weight, bias=bias, cu_seqlens=cu_seqlens)

    return _shared("para_gru", context, solve, slope, gates, 1, tolerance, then)


def context_para_lstm(
    context: Context,
    gates: torch.Tensor,
    weight: torch.Tensor,
    peephole: torch.Tensor,
    *,
    bias: torch.Tensor,
    tolerance: float,
    then: Then = _itself,
) -> torch.Tensor:
    """`para_lstm` of rows that several ranks share; as `context_para_gru`."""

    def solve(gates: torch.Tensor, initial: torch.Tensor, cu_seqlens: torch.Tensor | None):
        return para_lstm(
            gates, weight, peephole, bias=bias, initial_state=initial, cu_seqlens=cu_seqlens, tolerance=tolerance
        )  # fmt: skip

    def slope(gates: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return para_lstm_slope(gates, weight, peephole, bias=bias, cu_seqlens=cu_seqlens)

    return _shared("para_lstm", context, solve, slope, gates, 2, tolerance, then)


def _shared(
    name: str, context: Context, solve: Solve, slope: Slope, gates: torch.Tensor, K: int, tolerance: float, then: Then
) -> torch.Tensor:
    """What `then` makes of h, from a solver of K state vectors a channel: (gates, initial (S, K, D), cu_seqlens) → h,
    final (S, K, D); and its slope at zeros: (gates, cu_seqlens) → ∂(final)/∂(initial) (S, K, K, D)."""
    (B, _), D = context.shape, gates.shape[-1]
    zeros = gates.new_zeros(B, K, D, dtype=state_dtype(gates))
    if not context.connected:
        return then(solve(gates, context.initial(zeros), context.cu_seqlens)[0])
    if context.longest_tail > WORTH * BURN_IN:
        found = _from_recent(name, context, solve, slope, gates, zeros, tolerance, then)
        if found is not None:
            return found
    for enter, passes, allowed in _entering(name, context, solve, gates, zeros, tolerance):
        h, final = solve(gates, context.initial(enter), context.cu_seqlens)
        if allowed is None:
            break
        ends = context.before(context.of_last(final.detach()))
        (gap,) = _largest(context, ends - enter.detach())
        if gap <= allowed:
            record_solve(f"{name}_over_ranks", passes, gap, True)
            break
    return then(h)


def _from_recent(
    name: str,
    context: Context,
    solve: Solve,
    slope: Slope,
    gates: torch.Tensor,
    zeros: torch.Tensor,
    tolerance: float,
    then: Then,
) -> torch.Tensor | None:
    """What `then` makes of h, from states that enter which are made of the last tokens of each shard alone; None if any
    rank's cells remember more."""
    whole, recent, bounds = context.with_recent(gates, BURN_IN)
    cut = [end - begin > BURN_IN for begin, end in context.last_pieces]
    depends = [c or p for c, p in zip(cut, context.passes[context.axis.rank])]
    end = solve(recent, zeros, bounds)[1]
    h, final = solve(whole, context.initial(context.before(end)), context.cu_seqlens)
    A = context.only(depends, slope(recent, bounds))
    gap = context.only(context.goes_on, (context.of_last(final) - end).detach())
    largest = _asked(context, A, gap)
    made = then(h)
    remembered, apart = largest()
    if remembered > FORGOTTEN or apart > max(tolerance, FORGOTTEN):
        return None
    record_solve(f"{name}_over_ranks", 1, apart, True)
    return made


def _entering(
    name: str, context: Context, solve: Solve, gates: torch.Tensor, zeros: torch.Tensor, tolerance: float
) -> Iterator[tuple[torch.Tensor, int, float | None]]:
    """States that enter, cheap ones first; after how many passes; and how far the states that leave may be from them.
    The last are exact whatever the cell: None, no need to look."""
    tail, enter, change = context.tail(gates), zeros, 0.0
    for n in range(context.chain):
        before, start = enter, context.only(context.passes[context.axis.rank], enter)
        end, A = _linearise(context, solve, tail, start)
        enter = _fold(context, end, A, start)
        if n + 1 >= PASSES and context.chain > PASSES:
            (change,) = _largest(context, enter - before)
            if change <= tolerance and n + 1 < context.chain:
                yield _with_gradient(context, solve, tail, enter), n + 2, tolerance
    if context.chain > PASSES:
        record_solve(f"{name}_over_ranks", context.chain + 1, change, change <= tolerance)
    yield _with_gradient(context, solve, tail, enter), context.chain + 1, None


def _with_gradient(context: Context, solve: Solve, tail: torch.Tensor, enter: torch.Tensor) -> torch.Tensor:
    """The last pass, from whole shards: its value, and the gradient of the solution that it has come to."""
    start = context.only(context.passes[context.axis.rank], enter)
    _, end = solve(tail, start, context.tail_seqlens)
    if not context.chain:
        return context.before(end)
    _, A = _linearise(context, solve, tail, start, steep=True)
    # slopes that overflowed carry no gradient where there is none to carry
    slope = context.incoming(end, A.nan_to_num(nan=torch.nan), _apply)
    return _Gradient.apply(slope, _fold(context, end.detach(), _tame(A), start))


class _Gradient(torch.autograd.Function):
    """The gradient of the first, whose own value may have overflowed, and the value of the second."""

    @staticmethod
    def forward(ctx: Any, slope: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _linearise(
    context: Context, solve: Solve, tail: torch.Tensor, start: torch.Tensor, steep: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Φ (B, K, D) at `start`, and A (B, K, K, D), zero where the end does not depend on the start; tame slopes for the
    iteration, unless they are to be as `steep` as they are."""
    end, A = linearise(lambda start: solve(tail.detach(), start, context.tail_seqlens)[1], start)
    A = context.only(context.passes[context.axis.rank], A)
    return end, A if steep else _tame(A)


def _fold(context: Context, end: torch.Tensor, A: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return context.incoming(end - _apply(A, start), A, _apply)


def _apply(A: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """(B, K, K, D), (B, K, D) → (B, K, D)"""
    return (A * state[:, None]).sum(2)


def _tame(A: torch.Tensor) -> torch.Tensor:
    """Slopes for the iteration, which needs none to come to the solution, and might run away along steep ones."""
    return torch.nan_to_num(A, 0.0, 0.0, 0.0).clamp(-1, 1)


def _largest(context: Context, *changes: torch.Tensor) -> list[float]:
    """The largest number of each, of all ranks; infinite where one is not finite."""
    return _asked(context, *changes)()


def _asked(context: Context, *changes: torch.Tensor) -> Callable[[], list[float]]:
    """`_largest`, on its way to the host."""
    norms = [torch.linalg.vector_norm(change, torch.inf) for change in changes]
    largest = torch.stack(norms).nan_to_num(torch.inf, torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=context.axis.group)
    return to_host(largest)
