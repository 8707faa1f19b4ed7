"""Any cell for the shooting solver: its Jacobian and gradients by differentiating its step, as autograd would.

A channel's new states depend on that channel alone. Pulling a cotangent of ones back from new state i therefore gives,
in every channel at once, row i of its K × K Jacobian. (Pushing tangents forward gives columns as well, but costs more
than K backward passes through one recorded step.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.func import vjp

from riverrun.kernels.common.chunks import chunk_layout, sequence_bounds
from riverrun.kernels.common.shooting import Jacobian, States, solve, solve_backward


class DerivedCell:
    """`riverrun.kernels.common.shooting.Cell` from a step and the weight that it is used with."""

    def __init__(self, step: Callable, num_states: int, weight: torch.Tensor):
        self.step = step
        self.num_states = num_states
        self.weight = weight

    def run(self, start: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor, states: States) -> None:
        state = start.unbind(1)
        for gates_t, *out in zip(gates.unbind(1), *(x.unbind(1) for x in states)):
            state = tuple(self.step(state, gates_t, weight))
            for new, place in zip(state, out):
                place.copy_(new)

    def linearise(
        self, before: States, gates: torch.Tensor, after: States, weight: torch.Tensor
    ) -> tuple[Jacobian, torch.Tensor, torch.Tensor]:
        """In the place of the derivatives by the gates, the gates themselves: `gradients` starts from them."""
        *batch, G, D = gates.shape
        u = gates.reshape(-1, G, D)
        new, pull = vjp(lambda *state: tuple(self.step(state, u, weight)), *(x.reshape(-1, D) for x in before))[:2]
        J = []
        for i in range(self.num_states):
            rows = pull(tuple(torch.full_like(x, float(k == i)) for k, x in enumerate(new)))
            J.append([x.view(*batch, D) for x in rows])
        return J, gates, before[0]  # the last is not used

    def gradients(
        self, adjoint: States, before: States, after: States, by_gates: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, pull = vjp(lambda u, weight: tuple(self.step(before, u, weight)), by_gates, self.weight)[:2]
        grad_gates, grad_weight = pull(adjoint)
        return by_gates.copy_(grad_gates), grad_weight


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates, weight, initial_state, cu_seqlens, name, step, chunk_size, tolerance, max_passes):
        cell = DerivedCell(step, initial_state.shape[1], weight)
        chunks = chunk_layout(gates, chunk_size, cu_seqlens)
        states = solve(name, cell, gates, weight, initial_state, chunks, tolerance, max_passes)
        ctx.save_for_backward(states, gates, weight, initial_state, cu_seqlens)
        ctx.step, ctx.chunk_size, ctx.parallel = step, chunk_size, max_passes > 0
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        states, gates, weight, initial_state, cu_seqlens = ctx.saved_tensors
        cell = DerivedCell(ctx.step, len(states), weight.to(states.dtype))
        chunks = chunk_layout(gates, ctx.chunk_size, cu_seqlens)
        first = sequence_bounds(gates, cu_seqlens)[:-1].to(gates.device)
        with torch.autocast(gates.device.type, enabled=False):  # as the forward pass was called
            grads = solve_backward(cell, grad, states, gates, weight, initial_state, first, chunks, ctx.parallel)
        return *grads, *[None] * 6


def parallel_rnn_chunked(
    name: str,
    step: Callable,
    gates: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
    tolerance: float,
    max_passes: int,
) -> torch.Tensor:
    """As the operators of `riverrun.kernels.common.shooting.define_op`, for any step."""
    return _Solve.apply(gates, weight, initial_state, cu_seqlens, name, step, chunk_size, tolerance, max_passes)
