"""What long chunks make of their gates (`gates.chunk_ends`), and the way back, in one pass each, in float32: a program
has a chunk of a head.

    x_i = β_b / β_i + η_{i+1} x_{i+1}    G_i = θ_i x_i    N_i = θ_i m_b / m_i    f = η_1 x_1

The gradients of x, from the outputs' own γ_i = θ_i Ḡ_i (and η_1 f̄ at i = 1), and those of log η follow from
ν_i = η_i (γ_{i−1} + ν_{i−1}): they are γ_i + ν_i, and ν_i x_i. Nothing is divided, so no gate need be above 0.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due
from riverrun.kernels.common.triton_math import exp
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.neural_memory.rule import Gates

A_WARPS, MOST_WARPS = 256, 16  # tokens of a warp, and warps of a program


@triton.jit
def _then(a, x, b, y):
    """First h ↦ a h + x, then h ↦ b h + y."""
    return a * b, b * x + y


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def forward_kernel(
    log_keep,  # (L, B, T, H)
    lr,
    log_momentum,
    writes,  # (L, P, B, T, H)
    ends,  # (L, 1 or 3, B, chunks, H)
    kept,  # (L, 1 or 3, B, T, H): β_b / β_i, x_i and m_b / m_i
    B,
    T,
    b,
    H: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    chunk, row, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    E: tl.constexpr = 2 * P - 1
    layer, size = row // B, tl.minimum(b, T - chunk * b)
    i = size - 1 - tl.arange(0, C)  # from the last token to the first
    here, later = i >= 0, (i >= 0) & (i < size - 1)
    first, at = (row.to(tl.int64) * T + chunk * b) * H + h, i * H
    step = B * T * H  # from one part of a layer to the next
    write, keep = writes + first + (P - 1) * layer * step, kept + first + (E - 1) * layer * step
    to_end = exp(tl.cumsum(_load(log_keep + first, at + H, later), axis=0))
    theta = _load(lr + first, at, here)
    x = to_end
    end = ends + ((layer * E * B + row % B) * tl.num_programs(0) + chunk) * H + h
    end_step = B * tl.num_programs(0) * H
    tl.store(end, exp(tl.sum(_load(log_keep + first, at, here), axis=0)))
    if P == 2:
        momentum = _load(log_momentum + first, at + H, later)
        m_to_end = exp(tl.cumsum(momentum, axis=0))
        _, x = tl.associative_scan((exp(momentum), to_end), 0, _then)
        eta = exp(_load(log_momentum + first, at, i == 0))
        tl.store(end + end_step, tl.sum(tl.where(i == 0, eta * x, 0.0), axis=0))
        tl.store(end + 2 * end_step, exp(tl.sum(_load(log_momentum + first, at, here), axis=0)))
        tl.store(write + step + at, theta * m_to_end, mask=here)
        tl.store(keep + step + at, x, mask=here)
        tl.store(keep + 2 * step + at, m_to_end, mask=here)
    tl.store(write + at, theta * x, mask=here)
    tl.store(keep + at, to_end, mask=here)


@triton.jit
def backward_kernel(
    by_writes,  # (L, P, B, T, H)
    by_ends,  # (L, 1 or 3, B, chunks, H)
    lr,  # (L, B, T, H)
    log_momentum,
    ends,
    kept,
    by_log_keep,  # (L, B, T, H)
    by_lr,
    by_log_momentum,
    B,
    T,
    b,
    H: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    chunk, row, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    E: tl.constexpr = 2 * P - 1
    layer, size = row // B, tl.minimum(b, T - chunk * b)
    i = tl.arange(0, C)
    here, earlier = i < size, (i > 0) & (i < size)
    first, at = (row.to(tl.int64) * T + chunk * b) * H + h, i * H
    step = B * T * H
    by_G, to_end = by_writes + first + (P - 1) * layer * step, kept + first + (E - 1) * layer * step
    end = ((layer * E * B + row % B) * tl.num_programs(0) + chunk) * H + h
    end_step = B * tl.num_programs(0) * H
    theta, of_G = _load(lr + first, at, here), _load(by_G, at, here)
    by_x, of_lr = theta * of_G, of_G * _load(to_end + (P - 1) * step, at, here)
    if P == 2:
        eta = exp(_load(log_momentum + first, at, here))
        of_f, of_m = tl.load(by_ends + end + end_step), tl.load(by_ends + end + 2 * end_step)
        through_f = of_f * tl.load(ends + end + end_step)
        by_x += tl.where(i == 0, of_f * eta, 0.0)
        before = _load(lr + first, at - H, earlier)
        by_x_before = before * _load(by_G, at - H, earlier)
        by_x_before += tl.where(i == 1, of_f * exp(_load(log_momentum + first, at - H, earlier)), 0.0)
        _, nu = tl.associative_scan((eta, eta * by_x_before), 0, _then)
        by_x += nu
        of_lr += _load(by_G + step, at, here) * _load(to_end + 2 * step, at, here)
        by_m = before * _load(by_G + step, at - H, earlier) * _load(to_end + 2 * step, at - H, earlier)
        of_momentum = nu * _load(to_end + step, at, here) + tl.cumsum(by_m, axis=0)
        of_momentum += tl.where(i == 0, through_f, 0.0) + of_m * tl.load(ends + end + 2 * end_step)
        tl.store(by_log_momentum + first + at, of_momentum, mask=here)
    tl.store(by_lr + first + at, of_lr, mask=here)
    through_beta = tl.load(by_ends + end) * tl.load(ends + end)
    of_keep = tl.cumsum(by_x * _load(to_end, at, here), axis=0)  # of the tokens up to each: of the one after it
    tl.store(by_log_keep + first + at + H, through_beta + of_keep, mask=i < size - 1)
    tl.store(by_log_keep + first + at, through_beta + tl.zeros([C], tl.float32), mask=i == 0)


def run_forward(
    log_keep: torch.Tensor, lr: torch.Tensor, log_momentum: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ `writes`, `ends`, and what a backward pass needs."""
    made, (programs, options) = empty(lr, log_momentum is not None, chunk_size), _launch(lr, log_momentum, chunk_size)
    forward_kernel[programs](log_keep, lr, lr if log_momentum is None else log_momentum, *made, **options)
    return made


def run_backward(
    by_writes: torch.Tensor,
    by_ends: torch.Tensor,
    lr: torch.Tensor,
    log_momentum: torch.Tensor | None,
    ends: torch.Tensor,
    kept: torch.Tensor,
    chunk_size: int,
) -> list[torch.Tensor]:
    """→ the gradients of the two or three gates."""
    made = [torch.empty_like(lr) for _ in range(2 if log_momentum is None else 3)]
    programs, options = _launch(lr, log_momentum, chunk_size)
    given = by_writes, by_ends, lr, lr if log_momentum is None else log_momentum, ends, kept
    backward_kernel[programs](*given, *made[:2], made[-1], **options)
    return made


def empty(lr: torch.Tensor, momentum: bool, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    L, B, T, H = lr.shape
    P, E, chunks = 1 + momentum, 1 + 2 * momentum, ceil_div(T, chunk_size)
    return lr.new_empty(L, P, B, T, H), lr.new_empty(L, E, B, chunks, H), lr.new_empty(L, E, B, T, H)


def _launch(
    lr: torch.Tensor, log_momentum: torch.Tensor | None, chunk_size: int
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    L, B, T, H = lr.shape
    C = power_of_2_from(min(chunk_size, T))
    warps = min(max(1, C // A_WARPS), MOST_WARPS)
    options = {"B": B, "T": T, "b": chunk_size, "H": H, "P": 1 if log_momentum is None else 2, "C": C}
    return (ceil_div(T, chunk_size), L * B, H), options | {"num_warps": warps}


def check(lr: torch.Tensor, momentum: bool, chunk_size: int, back: bool) -> None:
    """The self-check of the forward kernel for such gates, or of the backward one."""
    (L, _, _, H), device = lr.shape, lr.device

    def compare() -> float:
        from riverrun.kernels.neural_memory.long_chunks import gates_in_torch

        draw, T = draws(device), min(chunk_size, lr.shape[2]) + 16
        gates = [-draw(L, 1, T, H).exp() / chunk_size, draw(L, 1, T, H).sigmoid(), -draw(L, 1, T, H).exp()][
            : 2 + momentum
        ]

        def in_torch(*gates: torch.Tensor) -> list[torch.Tensor]:
            made = gates_in_torch(gates[0], gates[1], gates[2] if momentum else None, chunk_size)
            return [torch.cat([x.flatten() for x in made]), *made]

        log_momentum = gates[2] if momentum else None
        writes, ends, kept = run_forward(gates[0], gates[1], log_momentum, chunk_size)
        if not back:
            return deviation([writes, ends], in_double(in_torch, gates, None)[1:])
        by_writes, by_ends = draw(*writes.shape), draw(*ends.shape)
        upstream = torch.cat([by_writes.flatten(), by_ends.flatten()])
        got = run_backward(by_writes, by_ends, gates[1], log_momentum, ends, kept, chunk_size)
        return deviation(got, in_double(in_torch, gates, upstream)[3:])

    C = power_of_2_from(min(chunk_size, lr.shape[2]))
    sizes: dict[str, object] = {"H": H, "tokens": C, "momentum": momentum, "gradients": back}
    check_once("gates of long chunks", sizes, device, compare, 1e-4)


@operator("neural_memory_long_gates")
def _forward(
    log_keep: torch.Tensor, lr: torch.Tensor, log_momentum: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if is_due(lr):
        check(lr, log_momentum is not None, chunk_size, back=False)
    return run_forward(log_keep, lr, log_momentum, chunk_size)


@_forward.register_fake
def _(log_keep, lr, log_momentum, chunk_size):
    return empty(lr, log_momentum is not None, chunk_size)


@operator("neural_memory_long_gates_backward")
def _backward(
    by_writes: torch.Tensor,
    by_ends: torch.Tensor,
    lr: torch.Tensor,
    log_momentum: torch.Tensor | None,
    ends: torch.Tensor,
    kept: torch.Tensor,
    chunk_size: int,
) -> list[torch.Tensor]:
    if is_due(lr):
        check(lr, log_momentum is not None, chunk_size, back=True)
    return run_backward(by_writes, by_ends, lr, log_momentum, ends, kept, chunk_size)


@_backward.register_fake
def _(by_writes, by_ends, lr, log_momentum, *_):
    return [torch.empty_like(lr) for _ in range(2 if log_momentum is None else 3)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, lr, log_momentum, ctx.chunk_size = inputs
    ctx.save_for_backward(lr, log_momentum, *output[1:])


def _gradient(ctx: Any, by_writes: torch.Tensor, by_ends: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    made = _backward(by_writes.contiguous(), by_ends.contiguous(), *ctx.saved_tensors, ctx.chunk_size)
    return *made, *[None][len(made) - 2 :], None


_forward.register_autograd(_gradient, setup_context=_setup)


def long_gates_triton(
    log_keep: torch.Tensor, lr: torch.Tensor, log_momentum: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`writes` (L, P, B, T, H) and `ends` (L, 1 or 3, B, chunks, H) of gates (L, B, T, H), as `gates_in_torch`."""
    gates = Gates(log_keep, lr, log_momentum).each(torch.Tensor.contiguous)
    writes, ends, _ = _forward(*gates, chunk_size)
    return writes, ends
