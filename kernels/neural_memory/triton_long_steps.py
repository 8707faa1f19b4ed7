"""What a chunk makes of a state, and the way back: passes of `long_chunks_torch.py`, a row an input of a layer."""

from typing import Any

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.whole import ceil_div, power_of_2_from

BLOCK, MOST, WARPS = 1024, 512, 4  # numbers of a program's block, and its columns; 16 bytes a thread in bfloat16


@triton.jit
def step_kernel(
    state,  # (N, I, P, L, O)
    written,  # likewise
    ends,  # (L, 1 or 3, B, H): β, f and m
    after,  # (N, I, P, L, O)
    narrow,  # (N, I, L, O), if NARROW
    I,
    end_l,
    end_i,
    end_b,
    H: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    O: tl.constexpr,
    NARROW: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
):
    n, layer = tl.program_id(0), tl.program_id(2)
    i = tl.program_id(1) * R + tl.arange(0, R)
    row = n.to(tl.int64) * I + i
    end = ends + layer * end_l + n // H * end_b + n % H
    beta = tl.load(end).to(tl.float32)
    if P == 2:
        f, m = tl.load(end + end_i).to(tl.float32), tl.load(end + 2 * end_i).to(tl.float32)
    for start in range(0, O, BO):
        o = start + tl.arange(0, BO)
        mask = (i < I)[:, None] & (o < O)[None, :]
        at = (row * (P * L) + layer)[:, None] * O + o[None, :]
        new = beta * tl.load(state + at, mask=mask, other=0.0)
        new -= tl.load(written + at, mask=mask, other=0.0).to(tl.float32)
        if P == 2:
            S = tl.load(state + at + L * O, mask=mask, other=0.0)
            new += f * S
            S = m * S - tl.load(written + at + L * O, mask=mask, other=0.0).to(tl.float32)
            tl.store(after + at + L * O, S, mask=mask)
        tl.store(after + at, new, mask=mask)
        if NARROW:
            at = (row * L + layer)[:, None] * O + o[None, :]
            tl.store(narrow + at, new.to(narrow.dtype.element_ty), mask=mask)


@triton.jit
def step_back_kernel(
    state,  # (N, I, P, L, O)
    ends,  # (L, 1 or 3, B, H): β, f and m
    by_weights,  # (N, I, L, O)
    adjoint,  # (N, I, P, L, O)
    narrow,  # likewise, if NARROW
    sums,  # (L, 1 or 3, N, blocks), if LIVE
    I,
    end_l,
    end_i,
    end_b,
    N,
    H: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    O: tl.constexpr,
    LIVE: tl.constexpr,
    NARROW: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
):
    n, block, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = block * R + tl.arange(0, R)
    row = n.to(tl.int64) * I + i
    end = ends + layer * end_l + n // H * end_b + n % H
    beta = tl.load(end).to(tl.float32)
    of_beta = tl.zeros([R], tl.float32)
    if P == 2:
        f, m = tl.load(end + end_i).to(tl.float32), tl.load(end + 2 * end_i).to(tl.float32)
        of_f = tl.zeros([R], tl.float32)
        of_m = tl.zeros([R], tl.float32)
    for start in range(0, O, BO):
        o = start + tl.arange(0, BO)
        mask = (i < I)[:, None] & (o < O)[None, :]
        at = (row * (P * L) + layer)[:, None] * O + o[None, :]
        of_A = tl.load(by_weights + (row * L + layer)[:, None] * O + o[None, :], mask=mask, other=0.0).to(tl.float32)
        of_S = tl.zeros([R, BO], tl.float32)
        if LIVE:
            by_A = tl.load(adjoint + at, mask=mask, other=0.0)
            of_A += beta * by_A
            of_beta += tl.sum(by_A * tl.load(state + at, mask=mask, other=0.0), axis=1)
            if P == 2:
                by_S = tl.load(adjoint + at + L * O, mask=mask, other=0.0)
                of_S = f * by_A + m * by_S
                S = tl.load(state + at + L * O, mask=mask, other=0.0)
                of_f += tl.sum(by_A * S, axis=1)
                of_m += tl.sum(by_S * S, axis=1)
        tl.store(adjoint + at, of_A, mask=mask)
        if P == 2:
            tl.store(adjoint + at + L * O, of_S, mask=mask)
        if NARROW:
            tl.store(narrow + at, of_A.to(narrow.dtype.element_ty), mask=mask)
            if P == 2:
                tl.store(narrow + at + L * O, of_S.to(narrow.dtype.element_ty), mask=mask)
    if LIVE:
        blocks = tl.num_programs(1)
        E: tl.constexpr = 2 * P - 1
        at = sums + (layer * E * N + n) * blocks + block
        tl.store(at, tl.sum(of_beta, axis=0))
        if P == 2:
            tl.store(at + N * blocks, tl.sum(of_f, axis=0))
            tl.store(at + 2 * N * blocks, tl.sum(of_m, axis=0))


def step(
    state: torch.Tensor, written: torch.Tensor, ends: torch.Tensor, after: torch.Tensor, narrow: torch.Tensor | None
) -> None:
    programs, options = _of_state(state, ends)
    given = state, written, ends, after, after if narrow is None else narrow
    step_kernel[programs](*given, state.shape[1], *ends.stride()[:3], NARROW=narrow is not None, **options)


def step_back(
    state: torch.Tensor,
    ends: torch.Tensor,
    by_weights: torch.Tensor,
    adjoint: torch.Tensor,
    narrow: torch.Tensor | None,
    by_ends: torch.Tensor | None,
) -> None:
    programs, options = _of_state(state, ends)
    N, blocks, L = programs
    sums = adjoint.new_empty(L, ends.shape[1], N, blocks) if by_ends is not None else adjoint
    given = state, ends, by_weights, adjoint, adjoint if narrow is None else narrow, sums
    step_back_kernel[programs](
        *given, state.shape[1], *ends.stride()[:3], N, LIVE=by_ends is not None, NARROW=narrow is not None, **options
    )
    if by_ends is not None:
        by_ends.copy_(sums.sum(-1).view(by_ends.shape))


def _of_state(state: torch.Tensor, ends: torch.Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    N, I, P, L, O = state.shape
    block = min(power_of_2_from(O), MOST)
    R = BLOCK // block
    options = {"H": ends.shape[-1], "P": P, "L": L, "O": O, "R": R, "BO": block, "num_warps": WARPS}
    return (N, ceil_div(I, R), L), options
