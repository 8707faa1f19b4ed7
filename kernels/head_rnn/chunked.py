"""`head_rnn` with one batched matrix product a step, over heads of any size: the path for CPUs and for wide heads.

A step depends on the one before through a dense matrix, so that nothing can be done in chunks of time. What can be
gathered is: tokens are laid out step by step, all sequences that still run side by side; the backward pass recomputes
the pre-activations of all steps in one product, and takes the gradient of the weights in another.
"""

from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from riverrun.kernels.common.chunks import chunk_layout
from riverrun.kernels.head_rnn.cells import CELLS


def head_rnn_chunked(
    gates: torch.Tensor, weight: torch.Tensor, cell: str, initial_state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.head_rnn.head_rnn`."""
    steps = chunk_layout(gates, 1, cu_seqlens)  # chunks of one token, in the order of the scan
    u = steps.split(gates)[:, 0]  # (N, G, H, K)
    states = _Recurrence.apply(u, weight, steps.sort(initial_state), steps.active, cell)  # (N, NS, H, K)
    (B, T), last = steps.shape, steps.place.view(steps.shape)
    last = last[:, -1] if cu_seqlens is None else last[0].index_select(0, cu_seqlens[1:].long() - 1)
    h = steps.join(states[:, None, -1]).view(B, T, *gates.shape[3:])
    return h.to(gates.dtype), states.index_select(0, last)


def _recur(h: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """h (n, H, K), weight (H, K, G·K) → (n, G, H, K); the product in `dtype`."""
    out = torch.bmm(h.to(dtype).transpose(0, 1), weight).to(h.dtype)  # (H, n, G·K)
    return out.unflatten(2, (-1, h.shape[2])).permute(1, 2, 0, 3)


class _Recurrence(torch.autograd.Function):
    """u (N, G, H, K) step by step, weight (G, H, K, K), initial (S, NS, H, K) longest first → states (N, NS, H, K)."""

    @staticmethod
    def forward(
        ctx: Any, u: torch.Tensor, weight: torch.Tensor, initial: torch.Tensor, active: tuple[int, ...], cell: str
    ) -> torch.Tensor:
        joined = weight.permute(1, 2, 0, 3).flatten(2).to(u.dtype)  # (H, K, G·K)
        states = initial.new_empty(len(u), *initial.shape[1:])
        state, start = initial.unbind(1), 0
        for n in active:
            rows = slice(start, start + n)
            state = tuple(x[:n] for x in state)
            rec = _recur(state[-1], joined, u.dtype)
            state = CELLS[cell].step(state, u[rows].to(initial.dtype).unbind(1), rec.unbind(1))
            torch.stack(state, dim=1, out=states[rows])
            start += n
        ctx.active, ctx.cell = active, cell
        ctx.save_for_backward(u, weight, joined, initial, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, weight, joined, initial, states = ctx.saved_tensors
        active, back = ctx.active, CELLS[ctx.cell].back
        # the state before each step is that of the same sequence's place in the step before
        starts = accumulate(active[:-1], initial=0)
        before = torch.cat([initial, *(states[start : start + n] for start, n in zip(starts, active[1:]))])
        rec = _recur(before[:, -1], joined, u.dtype)
        by_u, by_rec = torch.empty_like(rec), torch.empty_like(rec)
        carry = torch.zeros_like(initial)
        end = len(u)
        for n in reversed(active):
            rows = slice(end - n, end)
            total = grad[rows] + carry[:n]
            new_u, new_rec, old = back(
                before[rows].unbind(1), u[rows].to(total.dtype).unbind(1), rec[rows].unbind(1), total.unbind(1)
            )
            torch.stack(new_u, dim=1, out=by_u[rows])
            torch.stack(new_rec, dim=1, out=by_rec[rows])
            through = torch.bmm(by_rec[rows].permute(2, 0, 1, 3).flatten(2).to(u.dtype), joined.mT)  # (H, n, K)
            carry[:n] = torch.stack((*old[:-1], old[-1] + through.transpose(0, 1)), dim=1)
            end -= n
        h = before[:, -1].to(u.dtype).permute(1, 2, 0)  # (H, K, N)
        grad_weight = torch.bmm(h, by_rec.permute(2, 0, 1, 3).flatten(2).to(u.dtype))  # (H, K, G·K)
        grad_weight = grad_weight.unflatten(2, (-1, weight.shape[3])).permute(2, 0, 1, 3)
        return by_u.to(u.dtype), grad_weight.to(weight.dtype), carry, None, None
