"""The Triton solver of nonlinear recurrences without mixing of channels as torch operators: launches, gradients,
statistics. The method is told in `triton_solve.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due, rounding
from riverrun.kernels.common.shooting import final_state, statistics_of, statistics_on
from riverrun.kernels.common.triton_documents import document_starts
from riverrun.kernels.common.triton_solve import backward_kernel, forward_kernel
from riverrun.kernels.common.whole import ceil_div, power_of_2_from

STEPS = 8  # tokens that are loaded ahead as a group, and between checkpoints. The time that Triton takes to compile a
# kernel rises faster than the square.
BURN_IN = 64  # tokens
FULL, OVERFULL = 480, 1000  # lanes a multiprocessor: when chunks are not needed, and when there are enough of them
SHORTEST_CHUNK = 128  # tokens; below, the burn-in costs more than the parallelism gains
FORWARD_LANES_PER_THREAD, BACKWARD_LANES_PER_THREAD = 2, 2
MAX_LANES = 512  # of a program
BACKWARD_PASSES = 2  # it is linear: the second is from exact starts


@dataclass(frozen=True)
class TritonCell:
    """A cell's functions for the kernels (see `para_gru/triton_cell.py`), and how many states, gates and weights."""

    num_states: int
    num_gates: int
    num_weights: int
    activate: Any
    new_state: Any
    jacobian: Any
    gradients: Any


@dataclass(frozen=True)
class Launch:
    """How B rows of T tokens and D channels are cut: `chunks` of `length` tokens, `block` channels a program."""

    chunks: int
    length: int
    burn_in: int
    block: int

    @classmethod
    def for_gates(cls, gates: torch.Tensor, chunk_size: int | None) -> "Launch":
        """On the device of the gates (B, T, G, D)."""
        B, T, _, D = gates.shape
        return cls.of(B, T, D, chunk_size, multiprocessors(gates))

    @classmethod
    def of(cls, B: int, T: int, D: int, chunk_size: int | None, multiprocessors: int) -> "Launch":
        """Without a chunk size: as few chunks as fill the device."""
        block = min(64, power_of_2_from(D))
        while block > 16 and B * ceil_div(D, block) < multiprocessors:
            block //= 2
        lanes = B * D
        if chunk_size is not None:
            chunks = power_of_2_from(ceil_div(T, max(chunk_size, STEPS)))
        elif lanes >= FULL * multiprocessors:
            chunks = 1
        else:
            enough = max(1, min(OVERFULL * multiprocessors // lanes, T // SHORTEST_CHUNK))
            chunks = 1 << (enough.bit_length() - 1)  # the power of two below
        chunks = min(chunks, MAX_LANES // block)
        length = ceil_div(ceil_div(T, chunks), STEPS) * STEPS
        return cls(chunks, length, min(BURN_IN, length) if chunks > 1 else 0, block)

    def exchange(self, like: torch.Tensor, programs: int, K: int) -> torch.Tensor:
        """What the kernels' `exchange` points to."""
        return like.new_empty(programs * (K + K * K) * self.chunks * self.block if self.chunks > 1 else 0)

    def options(self, T: int, D: int, lanes_per_thread: int) -> dict[str, Any]:
        lanes = self.chunks * self.block
        return {
            "C": self.chunks,
            "BD": self.block,
            "U": STEPS,
            "EVEN": self.chunks * self.length == T and D % self.block == 0,
            "num_warps": min(16, max(1, lanes // (32 * lanes_per_thread))),
        }


def _groups(T: int) -> int:
    return ceil_div(T, STEPS)


def solve(
    name: str | None,
    cell: TritonCell,
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    launch: Launch,
    tolerance: float,
    max_passes: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ h (B, T, D), final state (S, K, D), checkpoints (B, ⌈T / STEPS⌉, K, D), which are empty unless `save`. Counted
    under `name`, if there is one."""
    B, T, G, D = gates.shape
    K, packed = cell.num_states, cu_seqlens is not None
    words, documents = (gates, gates) if cu_seqlens is None else document_starts(cu_seqlens, T, STEPS)
    h = gates.new_empty(B, T, D)
    final = gates.new_empty(len(cu_seqlens) - 1 if cu_seqlens is not None else B, K, D, dtype=torch.float32)
    checkpoints = final.new_empty((B, _groups(T), K, D) if save else 0)
    pieces = B * ceil_div(D, launch.block)
    if name is None:
        counts = torch.zeros(3, dtype=torch.int32, device=gates.device)
    else:
        counts = statistics_on(name, gates.device)
        statistics = statistics_of(name)
        if launch.chunks > 1:
            statistics.pieces += pieces
        else:
            statistics.sequential += pieces
    forward_kernel[(pieces,)](
        gates, weight, weight if bias is None else bias, final if initial is None else initial,
        words, documents, h, checkpoints, final,
        launch.exchange(final, pieces, K), counts,
        T, launch.length, launch.burn_in, max_passes, tolerance,
        ACTIVATE=cell.activate, NEW_STATE=cell.new_state, JACOBIAN=cell.jacobian,
        D=D, G=G, K=K, P=cell.num_weights,
        HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None, PACKED=packed, SAVE=save,
        **launch.options(T, D, FORWARD_LANES_PER_THREAD),
    )  # fmt: skip
    return h, final, checkpoints


def solve_backward(
    cell: TritonCell,
    grad_h: torch.Tensor,
    grad_final: torch.Tensor | None,
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    checkpoints: torch.Tensor,
    launch: Launch,
    tolerance: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of the gates, of weight and bias (P + G, D) and of the initial state (empty if there is none),
    the last two in float32."""
    B, T, G, D = gates.shape
    K, P = cell.num_states, cell.num_weights
    words, documents = (gates, gates) if cu_seqlens is None else document_starts(cu_seqlens, T, STEPS)
    grad_gates = torch.empty_like(gates)
    shares = checkpoints.new_empty(B, P + G, D)
    grad_initial = checkpoints.new_empty(0 if initial is None else initial.shape)
    pieces = B * ceil_div(D, launch.block)
    backward_kernel[(pieces,)](
        grad_h, shares if grad_final is None else grad_final, gates, weight, weight if bias is None else bias,
        shares if initial is None else initial, words, documents, checkpoints, grad_gates, shares, grad_initial,
        launch.exchange(shares, pieces, K),
        T, launch.length, launch.burn_in, BACKWARD_PASSES, tolerance,
        ACTIVATE=cell.activate, NEW_STATE=cell.new_state, JACOBIAN=cell.jacobian, GRADIENTS=cell.gradients,
        D=D, G=G, K=K, P=P,
        HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None, HAS_FINAL=grad_final is not None,
        PACKED=cu_seqlens is not None,
        **launch.options(T, D, BACKWARD_LANES_PER_THREAD),
    )  # fmt: skip
    return grad_gates, shares.sum(0), grad_initial


def check(
    name: str,
    cell: TritonCell,
    chunked: Callable[..., torch.Tensor],
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    has_initial: bool,
    packed: bool,
    launch: Launch,
    gradients: bool,
) -> None:
    """The self-check of the kernels for such tensors, against the op `chunked` (see `shooting.define_op`)."""
    _, T, G, D = gates.shape
    even = launch.options(T, D, 1)["EVEN"]

    def compare() -> float:
        draw = draws(gates.device)
        length = 2 * STEPS if launch.chunks > 1 else 4 * STEPS
        T = launch.chunks * length - (0 if even else 3)
        small = Launch(launch.chunks, length, length if launch.chunks > 1 else 0, launch.block)
        bounds = [0, 1, 3, T // 2, T]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=gates.device) if packed else None
        S = len(bounds) - 1 if packed else 1
        u, upstream = draw(1, T, G, D).to(gates.dtype), draw(1, T, D).to(gates.dtype)
        w = (draw(cell.num_weights, D) / 4).to(weight.dtype)
        offset = None if bias is None else draw(G, D).to(bias.dtype)
        initial = draw(S, cell.num_states, D) if has_initial else None
        h, final, checkpoints = solve(None, cell, u, w, offset, initial, cu_seqlens, small, 1e-5, 8, gradients)
        got = [h, final]
        if gradients:
            grad_u, shares, grad_initial = solve_backward(
                cell, upstream, None, u, w, offset, initial, cu_seqlens, checkpoints, small, 1e-5
            )
            got += [grad_u, shares[: cell.num_weights]]
            got += [] if bias is None else [shares[cell.num_weights :]]
            got += [] if initial is None else [grad_initial]

        def step_by_step(gates, weight, bias, initial):
            gates = gates if bias is None else gates + bias
            initial = gates.new_zeros(S, cell.num_states, D) if initial is None else initial
            states = chunked(gates, weight, initial, cu_seqlens, T, 1e-5, 0)
            statistics_of(name).sequential -= 1  # which is no solve of the user's
            return states[-1], final_state(states, cu_seqlens)

        want = in_double(step_by_step, (u, w, offset, initial), upstream if gradients else None)
        return deviation(got, want)

    sizes: dict[str, object] = {
        "D": D,
        "chunks": launch.chunks,
        "block": launch.block,
        "even": even,
        "bias": bias is not None,
    }
    sizes |= {"initial": has_initial, "packed": packed, "gradients": gradients}
    sizes |= {"dtype": gates.dtype, "parameters": weight.dtype}
    check_once(name, sizes, gates.device, compare, rounding(gates.dtype))


def define_triton_op(
    name: str, cell: TritonCell, chunked: Callable[..., torch.Tensor]
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Register the solver of `cell` as a torch operator with a gradient, opaque to torch.compile, that is checked at
    first use against the one in torch.

    `(gates (B, T, G, D), weight (P, D), bias (G, D), initial_state (S, K, D), cu_seqlens, chunk_size, tolerance,
    max_passes) → h (B, T, D), final state (S, K, D) float32`; bias, initial_state and cu_seqlens may be None. The gates
    may be float32, bfloat16 or float16; h has their type, arithmetic is float32.
    """

    @operator(f"{name}_triton")
    def forward(
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        initial: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        chunk_size: int | None,
        tolerance: float,
        max_passes: int,
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        launch = Launch.for_gates(gates, chunk_size)
        if is_due(gates):
            given = initial is not None, cu_seqlens is not None
            check(name, cell, chunked, gates, weight, bias, *given, launch, save)
        return solve(name, cell, gates, weight, bias, initial, cu_seqlens, launch, tolerance, max_passes, save)

    @forward.register_fake
    def _(gates, weight, bias, initial, cu_seqlens, chunk_size, tolerance, max_passes, save):
        B, T, _, D = gates.shape
        S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final = gates.new_empty(S, cell.num_states, D, dtype=torch.float32)
        return gates.new_empty(B, T, D), final, final.new_empty((B, _groups(T), cell.num_states, D) if save else 0)

    @operator(f"{name}_triton_backward")
    def backward(
        grad_h: torch.Tensor,
        grad_final: torch.Tensor | None,
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        initial: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        checkpoints: torch.Tensor,
        chunk_size: int | None,
        tolerance: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        launch = Launch.for_gates(gates, chunk_size)
        return solve_backward(
            cell, grad_h, grad_final, gates, weight, bias, initial, cu_seqlens, checkpoints, launch, tolerance
        )

    @backward.register_fake
    def _(grad_h, grad_final, gates, weight, bias, initial, cu_seqlens, checkpoints, chunk_size, tolerance):
        rows = weight.shape[0] + gates.shape[2]
        new = checkpoints.new_empty
        return torch.empty_like(gates), new(rows, gates.shape[3]), new(0 if initial is None else initial.shape)

    def setup_context(ctx, inputs, output):
        gates, weight, bias, initial, cu_seqlens, ctx.chunk_size, ctx.tolerance, _, save = inputs
        assert save, "called without checkpoints, but a gradient is wanted"
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, weight, bias, initial, cu_seqlens, output[2])

    def gradient(ctx, grad_h, grad_final, _):
        gates, weight, bias, initial, cu_seqlens, checkpoints = ctx.saved_tensors
        B, T, _, D = gates.shape
        grad_h = gates.new_zeros(B, T, D) if grad_h is None else grad_h.contiguous()
        grad_final = None if grad_final is None else grad_final.contiguous()
        grad_gates, shares, grad_initial = backward(
            grad_h, grad_final, gates, weight, bias, initial, cu_seqlens, checkpoints, ctx.chunk_size, ctx.tolerance
        )
        grad_weight, grad_bias = shares.split([cell.num_weights, cell.num_gates])
        return (
            grad_gates,
            grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None if initial is None else grad_initial,
            *(None,) * 5,
        )

    forward.register_autograd(gradient, setup_context=setup_context)

    def call(
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        initial: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        chunk_size: int | None,
        tolerance: float,
        max_passes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [x if x is None else x.contiguous() for x in (gates, weight, bias, initial, cu_seqlens)]
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        return forward(*tensors, chunk_size, tolerance, max_passes, save)[:2]

    return call
