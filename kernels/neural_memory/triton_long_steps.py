"""What a chunk makes of a state, and the way back: passes of `long_chunks_torch.py`. A program has some inputs and
outputs of a layer."""

from typing import Any

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.whole import ceil_div, power_of_2_from

BLOCK, MOST, WARPS = 1024, 512, 4  # numbers of a program's block, and its columns; 16 bytes a thread in bfloat16


@triton.jit
def _block(I, layer, P: tl.constexpr, L: tl.constexpr, O: tl.constexpr, R: tl.constexpr, BO: tl.constexpr):
    """Places in (I, P, L, O), in (I, L, O), and which exist."""
    across: tl.constexpr = (O + BO - 1) // BO
    block = tl.program_id(1)
    i, o = block // across * R + tl.arange(0, R), block % across * BO + tl.arange(0, BO)
    mask = (i < I)[:, None] & (o < O)[None, :]
    return (i * (P * L) + layer)[:, None] * O + o[None, :], (i * L + layer)[:, None] * O + o[None, :], mask


@triton.jit
def step_kernel(
    state,  # (M, I, P, L, O), M: N, or H that all sequences share
    written,  # (N, I, P, L, O)
    ends,  # (L, 1 or 3, B, chunks, H): β, f and m
    after,  # (N, I, P, L, O)
    narrow,  # (N, I, L, O), if NARROW
    M,
    I,
    B,
    chunks,
    chunk,
    end_l,
    H: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    O: tl.constexpr,
    NARROW: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
):
    n, layer = tl.program_id(0).to(tl.int64), tl.program_id(2)
    at, weight, mask = _block(I, layer, P, L, O, R, BO)
    of_state, size = at + n % M * (I * P * L * O), n * (I * P * L * O)
    end = ends + layer * end_l + (n // H * chunks + chunk) * H + n % H
    A = tl.load(state + of_state, mask=mask, other=0.0)
    new = tl.load(end) * A - tl.load(written + size + at, mask=mask, other=0.0).to(tl.float32)
    if P == 2:
        end_i = B * chunks * H
        S = tl.load(state + of_state + L * O, mask=mask, other=0.0)
        new += tl.load(end + end_i) * S
        S = tl.load(end + 2 * end_i) * S
        S -= tl.load(written + size + at + L * O, mask=mask, other=0.0).to(tl.float32)
        tl.store(after + size + at + L * O, S, mask=mask)
    tl.store(after + size + at, new, mask=mask)
    if NARROW:
        tl.store(narrow + n * (I * L * O) + weight, new.to(narrow.dtype.element_ty), mask=mask)


@triton.jit
def step_back_kernel(
    state,  # (M, I, P, L, O), M: N, or H that all sequences share
    ends,  # (L, 1 or 3, B, chunks, H): β, f and m
    by_weights,  # (N, I, L, O)
    adjoint,  # (N, I, P, L, O)
    before,  # (M, I, P, L, O)
    narrow,  # (N, I, P, L, O), if NARROW
    sums,  # (L, 1 or 3, B, chunks, H, blocks)
    N,
    M,
    I,
    B,
    chunks,
    chunk,
    end_l,
    blocks,
    H: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    O: tl.constexpr,
    LIVE: tl.constexpr,  # 0, 1 or P of the gradients of A' and S' are not 0
    NARROW: tl.constexpr,
    R: tl.constexpr,
    BO: tl.constexpr,
):
    m, layer = tl.program_id(0).to(tl.int64), tl.program_id(2)
    at, weight, mask = _block(I, layer, P, L, O, R, BO)
    own = m * (I * P * L * O)
    end_i = B * chunks * H
    of_A = tl.zeros([R, BO], tl.float32)
    of_S = tl.zeros([R, BO], tl.float32)
    if LIVE > 0:
        A = tl.load(state + own + at, mask=mask, other=0.0)
        if P == 2:
            S = tl.load(state + own + at + L * O, mask=mask, other=0.0)
    for sequence in range(N // M):
        n = m + sequence * M
        size = n * (I * P * L * O)
        to_A = tl.load(by_weights + n * (I * L * O) + weight, mask=mask, other=0.0).to(tl.float32)
        to_S = tl.zeros([R, BO], tl.float32)
        if LIVE > 0:
            place = (n // H * chunks + chunk) * H + n % H
            end = ends + layer * end_l + place
            part = sums + (layer * (2 * P - 1) * end_i + place) * blocks + tl.program_id(1)
            by_A = tl.load(adjoint + size + at, mask=mask, other=0.0)
            to_A += tl.load(end) * by_A
            tl.store(part, tl.sum(by_A * A))
            if P == 2:
                to_S = tl.load(end + end_i) * by_A
                tl.store(part + end_i * blocks, tl.sum(by_A * S))
            if LIVE == 2:
                by_S = tl.load(adjoint + size + at + L * O, mask=mask, other=0.0)
                to_S += tl.load(end + 2 * end_i) * by_S
                tl.store(part + 2 * end_i * blocks, tl.sum(by_S * S))
        if NARROW:
            tl.store(narrow + size + at, to_A.to(narrow.dtype.element_ty), mask=mask)
            if P == 2 and LIVE > 0:
                tl.store(narrow + size + at + L * O, to_S.to(narrow.dtype.element_ty), mask=mask)
        of_A += to_A
        of_S += to_S
    tl.store(before + own + at, of_A, mask=mask)
    if P == 2 and (LIVE > 0 or not NARROW):
        tl.store(before + own + at + L * O, of_S, mask=mask)


def blocks(state: torch.Tensor) -> int:
    _, I, _, _, O = state.shape
    R, BO = _block_of(O)
    return ceil_div(I, R) * ceil_div(O, BO)


def step(
    state: torch.Tensor,
    written: torch.Tensor,
    ends: torch.Tensor,
    chunk: int,
    after: torch.Tensor,
    narrow: torch.Tensor | None,
) -> None:
    M, N, options = len(state), len(after), _options(state, ends)
    step_kernel[N, blocks(state), len(ends)](
        state, written, ends, after, after if narrow is None else narrow, M, state.shape[1], *ends.shape[2:4], chunk,
        ends.stride(0), NARROW=narrow is not None, **options,
    )  # fmt: skip


def step_back(
    state: torch.Tensor,
    ends: torch.Tensor,
    chunk: int,
    by_weights: torch.Tensor,
    adjoint: torch.Tensor,
    before: torch.Tensor,
    narrow: torch.Tensor | None,
    sums: torch.Tensor,
    live: int,
) -> None:
    M, N, options = len(state), len(adjoint), _options(state, ends)
    step_back_kernel[M, blocks(state), len(ends)](
        state, ends, by_weights, adjoint, before, adjoint if narrow is None else narrow, sums, N, M, state.shape[1],
        *ends.shape[2:4], chunk, ends.stride(0), sums.shape[-1], LIVE=live, NARROW=narrow is not None, **options,
    )  # fmt: skip


def _block_of(O: int) -> tuple[int, int]:
    """Rows and columns."""
    columns = min(power_of_2_from(O), MOST)
    return BLOCK // columns, columns


def _options(state: torch.Tensor, ends: torch.Tensor) -> dict[str, Any]:
    (_, _, P, L, O), (R, BO) = state.shape, _block_of(state.shape[-1])
    return {"H": ends.shape[-1], "P": P, "L": L, "O": O, "R": R, "BO": BO, "num_warps": WARPS}
