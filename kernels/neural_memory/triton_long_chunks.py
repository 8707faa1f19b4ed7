"""The passes of `long_chunks_torch.py`, which says what they do, as Triton kernels: each reads and writes once, and
computes in float32.

A program has some rows and, one block after the other, all of their columns; a row is a token of a head.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.neural_memory.long_chunks_torch import Passes
from riverrun.kernels.neural_memory.triton_gated import activation
from riverrun.kernels.neural_memory.triton_long_steps import BLOCK, MOST, WARPS, step, step_back


@triton.jit
def _place(rows, size, H: tl.constexpr, R: tl.constexpr):
    """Rows of (B, H, size) → their b, h and token; and which exist."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    n = row // size
    return (n // H).to(tl.int64), n % H, row % size, row < rows


@triton.jit
def move_kernel(
    source,  # (B, b, H, D), in any order but that of D
    target,
    rows,
    size,
    source_b,
    source_t,
    source_h,
    target_b,
    target_t,
    target_h,
    sign,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    b, h, t, exists = _place(rows, size, H, R)
    take = b * source_b + t * source_t + h * source_h
    give = b * target_b + t * target_t + h * target_h
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        mask = exists[:, None] & (d < D)[None, :]
        x = tl.load(source + take[:, None] + d[None, :], mask=mask, other=0.0)
        tl.store(target + give[:, None] + d[None, :], (sign * x.to(tl.float32)).to(x.dtype), mask=mask)


@triton.jit
def hidden_kernel(
    ac,  # (N, r, 2 F)
    h,  # (N, r, F)
    rows,
    size,
    of_ac,  # numbers from one memory to the next
    of_h,
    H: tl.constexpr,
    F: tl.constexpr,
    SILU: tl.constexpr,
    R: tl.constexpr,
    BF: tl.constexpr,
):
    b, head, t, exists = _place(rows, size, H, R)
    n = b * H + head
    take, give = n * of_ac + t * (2 * F), n * of_h + t * F
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        mask = exists[:, None] & (f < F)[None, :]
        at = ac + take[:, None] + f[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        value, _, _ = activation(a, SILU)
        tl.store(h + give[:, None] + f[None, :], (value * c).to(h.dtype.element_ty), mask=mask)


@triton.jit
def hidden_back_kernel(
    by_h,  # (N, r, F)
    ac,  # (N, r, 2 F)
    by_ac,  # (N, r, 2 F)
    h,  # (N, r, F)
    rows,
    size,
    known,  # rows of a memory that are added to, and whose h there is
    of_by_h,
    of_ac,
    of_by_ac,
    of_h,
    H: tl.constexpr,
    F: tl.constexpr,
    SILU: tl.constexpr,
    R: tl.constexpr,
    BF: tl.constexpr,
):
    b, head, t, exists = _place(rows, size, H, R)
    n = b * H + head
    by, take, give, out = n * of_by_h + t * F, n * of_ac + t * (2 * F), n * of_by_ac + t * (2 * F), n * of_h + t * F
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        mask = exists[:, None] & (f < F)[None, :]
        old = mask & (t < known)[:, None]
        grad = tl.load(by_h + by[:, None] + f[None, :], mask=mask, other=0.0).to(tl.float32)
        at = ac + take[:, None] + f[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        at = by_ac + give[:, None] + f[None, :]
        by_a = tl.load(at, mask=old, other=0.0).to(tl.float32)
        by_c = tl.load(at + F, mask=old, other=0.0).to(tl.float32)
        value, first, _ = activation(a, SILU)
        tl.store(at, (by_a + grad * c * first).to(by_ac.dtype.element_ty), mask=mask)
        tl.store(at + F, (by_c + grad * value).to(by_ac.dtype.element_ty), mask=mask)
        new = mask & (t >= known)[:, None]
        tl.store(h + out[:, None] + f[None, :], (value * c).to(h.dtype.element_ty), mask=new)


@triton.jit
def gradients_kernel(
    dh,  # (N, b, F)
    ac,  # (N, b, 2 F)
    through,  # (N, b, P, 2, F), if BACK, as all that begins with by_
    writes,  # (2, P, B, b, H)
    by_writes,
    weighted,  # (N, b, P, 2, F)
    by_dh,  # (N, b, F)
    by_ac,  # (N, b, 2 F)
    rows,
    size,
    of_ac,
    of_by_ac,
    write_l,
    write_p,
    write_b,
    write_t,
    by_l,
    by_p,
    by_b,
    by_t,
    H: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
    SILU: tl.constexpr,
    BACK: tl.constexpr,
    R: tl.constexpr,
    BF: tl.constexpr,
):
    b, head, t, exists = _place(rows, size, H, R)
    n = b * H + head
    row = n * size + t
    take, give = n * of_ac + t * (2 * F), n * of_by_ac + t * (2 * F)
    gate = writes + b * write_b + t * write_t + head
    G_a = tl.load(gate, mask=exists, other=0.0).to(tl.float32)[:, None]
    G_c = tl.load(gate + write_l, mask=exists, other=0.0).to(tl.float32)[:, None]
    if P == 2:
        N_a = tl.load(gate + write_p, mask=exists, other=0.0).to(tl.float32)[:, None]
        N_c = tl.load(gate + write_p + write_l, mask=exists, other=0.0).to(tl.float32)[:, None]
    of_G_a = tl.zeros([R], tl.float32)
    of_G_c = tl.zeros([R], tl.float32)
    of_N_a = tl.zeros([R], tl.float32)
    of_N_c = tl.zeros([R], tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        mask = exists[:, None] & (f < F)[None, :]
        d = tl.load(dh + row[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        at = ac + take[:, None] + f[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        value, first, second = activation(a, SILU)
        of_a, of_c = d * c * first, d * value
        at = row[:, None] * (2 * P * F) + f[None, :]
        kind = weighted.dtype.element_ty
        tl.store(weighted + at, (G_a * of_a).to(kind), mask=mask)
        tl.store(weighted + at + F, (G_c * of_c).to(kind), mask=mask)
        if P == 2:
            tl.store(weighted + at + 2 * F, (N_a * of_a).to(kind), mask=mask)
            tl.store(weighted + at + 3 * F, (N_c * of_c).to(kind), mask=mask)
        if BACK:
            x = tl.load(through + at, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(through + at + F, mask=mask, other=0.0).to(tl.float32)
            of_G_a -= tl.sum(x * of_a, axis=1)
            of_G_c -= tl.sum(y * of_c, axis=1)
            by_a, by_c = -G_a * x, -G_c * y
            if P == 2:
                x = tl.load(through + at + 2 * F, mask=mask, other=0.0).to(tl.float32)
                y = tl.load(through + at + 3 * F, mask=mask, other=0.0).to(tl.float32)
                of_N_a -= tl.sum(x * of_a, axis=1)
                of_N_c -= tl.sum(y * of_c, axis=1)
                by_a -= N_a * x
                by_c -= N_c * y
            at = by_dh + row[:, None] * F + f[None, :]
            tl.store(at, (by_a * c * first + by_c * value).to(by_dh.dtype.element_ty), mask=mask)
            at = by_ac + give[:, None] + f[None, :]
            tl.store(at, (d * (by_a * c * second + by_c * first)).to(by_ac.dtype.element_ty), mask=mask)
            tl.store(at + F, (d * by_a * first).to(by_ac.dtype.element_ty), mask=mask)
    if BACK:
        gate = by_writes + b * by_b + t * by_t + head
        tl.store(gate, of_G_a, mask=exists)
        tl.store(gate + by_l, of_G_c, mask=exists)
        if P == 2:
            tl.store(gate + by_p, of_N_a, mask=exists)
            tl.store(gate + by_p + by_l, of_N_c, mask=exists)


@triton.jit
def errors_kernel(
    e,  # (N, b, V)
    through,  # (N, b, P, V), if BACK, as all that begins with by_
    writes,  # (1, P, B, b, H)
    by_writes,
    weighted,  # (N, b, P, V)
    by_e,  # (N, b, V)
    rows,
    size,
    of_by_e,
    write_p,
    write_b,
    write_t,
    by_p,
    by_b,
    by_t,
    H: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BACK: tl.constexpr,
    R: tl.constexpr,
    BV: tl.constexpr,
):
    b, head, t, exists = _place(rows, size, H, R)
    n = b * H + head
    row, give = n * size + t, n * of_by_e + t * V
    gate = writes + b * write_b + t * write_t + head
    G = tl.load(gate, mask=exists, other=0.0).to(tl.float32)[:, None]
    if P == 2:
        N = tl.load(gate + write_p, mask=exists, other=0.0).to(tl.float32)[:, None]
    of_G = tl.zeros([R], tl.float32)
    of_N = tl.zeros([R], tl.float32)
    for start in range(0, V, BV):
        i = start + tl.arange(0, BV)
        mask = exists[:, None] & (i < V)[None, :]
        error = tl.load(e + row[:, None] * V + i[None, :], mask=mask, other=0.0).to(tl.float32)
        at = row[:, None] * (P * V) + i[None, :]
        tl.store(weighted + at, (G * error).to(weighted.dtype.element_ty), mask=mask)
        if P == 2:
            tl.store(weighted + at + V, (N * error).to(weighted.dtype.element_ty), mask=mask)
        if BACK:
            x = tl.load(through + at, mask=mask, other=0.0).to(tl.float32)
            of_G -= tl.sum(x * error, axis=1)
            by = -G * x
            if P == 2:
                x = tl.load(through + at + V, mask=mask, other=0.0).to(tl.float32)
                of_N -= tl.sum(x * error, axis=1)
                by -= N * x
            tl.store(by_e + give[:, None] + i[None, :], by.to(by_e.dtype.element_ty), mask=mask)
    if BACK:
        gate = by_writes + b * by_b + t * by_t + head
        tl.store(gate, of_G, mask=exists)
        if P == 2:
            tl.store(gate + by_p, of_N, mask=exists)


def move(source: torch.Tensor, target: torch.Tensor, sign: int = 1) -> None:
    B, b, H, D = source.shape
    strides = (*source.stride()[:3], *target.stride()[:3])
    programs, options = _of_rows(B * H * b, H, D=D)
    move_kernel[programs](source, target, B * H * b, b, *strides, sign, **options)


def hidden(ac: torch.Tensor, h: torch.Tensor, silu: bool) -> None:
    N, size, F = h.shape
    programs, options = _of_rows(N * size, 1, F=F)
    hidden_kernel[programs](ac, h, N * size, size, ac.stride(0), h.stride(0), SILU=silu, **options)


def hidden_back(
    by_h: torch.Tensor, ac: torch.Tensor, by_ac: torch.Tensor, h: torch.Tensor, known: int, silu: bool
) -> None:
    N, size, F = h.shape
    programs, options = _of_rows(N * size, 1, F=F)
    strides = (x.stride(0) for x in (by_h, ac, by_ac, h))
    hidden_back_kernel[programs](by_h, ac, by_ac, h, N * size, size, known, *strides, SILU=silu, **options)


def gradients(dh: torch.Tensor, ac: torch.Tensor, writes: torch.Tensor, weighted: torch.Tensor, silu: bool) -> None:
    _gradients(dh, ac, dh, writes, writes, weighted, dh, ac, silu, back=False)


def gradients_back(
    dh: torch.Tensor,
    ac: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_dh: torch.Tensor,
    by_ac: torch.Tensor,
    silu: bool,
) -> None:
    _gradients(dh, ac, through, writes, by_writes, weighted, by_dh, by_ac, silu, back=True)


def _gradients(
    dh: torch.Tensor,
    ac: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_dh: torch.Tensor,
    by_ac: torch.Tensor,
    silu: bool,
    back: bool,
) -> None:
    (N, b, F), (_, P, _, _, H) = dh.shape, writes.shape
    programs, options = _of_rows(N * b, H, F=F)
    strides = (ac.stride(0), by_ac.stride(0), *writes.stride()[:4], *by_writes.stride()[:4])
    gradients_kernel[programs](
        dh, ac, through, writes, by_writes, weighted, by_dh, by_ac, N * b, b, *strides,
        P=P, SILU=silu, BACK=back, **options | {"num_warps": 2 * WARPS if back else WARPS},
    )  # fmt: skip


def errors(e: torch.Tensor, writes: torch.Tensor, weighted: torch.Tensor) -> None:
    _errors(e, e, writes, writes, weighted, e, back=False)


def errors_back(
    e: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_e: torch.Tensor,
) -> None:
    _errors(e, through, writes, by_writes, weighted, by_e, back=True)


def _errors(
    e: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_e: torch.Tensor,
    back: bool,
) -> None:
    (N, b, V), (_, P, _, _, H) = e.shape, writes.shape
    programs, options = _of_rows(N * b, H, V=V)
    strides = (by_e.stride(0), *writes.stride()[1:4], *by_writes.stride()[1:4])
    errors_kernel[programs](
        e, through, writes, by_writes, weighted, by_e, N * b, b, *strides, P=P, BACK=back, **options
    )


def _of_rows(rows: int, H: int, **columns: int) -> tuple[tuple[int], dict[str, Any]]:
    """The programs for so many rows, and the options of a kernel that names its columns so."""
    ((name, size),) = columns.items()
    block = min(power_of_2_from(size), MOST)
    R = BLOCK // block
    return (ceil_div(rows, R),), {"H": H, name: size, "R": R, f"B{name}": block, "num_warps": WARPS}


IN_TRITON = Passes(move, hidden, hidden_back, gradients, gradients_back, errors, errors_back, step, step_back)
