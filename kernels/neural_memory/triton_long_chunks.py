"""The passes of `long_chunks_torch.py`, which says what they do, as Triton kernels: each reads and writes once, and
computes in float32.

A program has some rows and, one block after the other, all of their columns; a row is a token of a memory. Launches
take whole tensors and where a chunk starts: on the host a view takes a good part of what a launch does.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.neural_memory.long_chunks_torch import Passes
from riverrun.kernels.neural_memory.triton_gated import activation
from riverrun.kernels.neural_memory.triton_long_steps import BLOCK, MOST, WARPS, blocks, step, step_back


@triton.jit
def _place(memories, size, start, T, H: tl.constexpr, R: tl.constexpr):
    """Rows of (N, size) → their memories, tokens of the chunk, and places in (B, T, H); and which exist."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    n, t = (row // size).to(tl.int64), row % size
    return n, t, (n // H * T + start + t) * H + n % H, row < memories * size


@triton.jit
def _load(pointer, exists):
    """Of a row each, beside columns."""
    return tl.load(pointer, mask=exists, other=0.0).to(tl.float32)[:, None]


@triton.jit
def move_kernel(
    x,  # (B, T, H, D)
    y,  # likewise, if there are two
    rows,  # (N, r, D): of x, and of y
    of_rows,  # numbers from one memory to the next
    memories,
    size,
    start,
    T,
    sign,
    H: tl.constexpr,
    D: tl.constexpr,
    GATHER: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    n, t, token, exists = _place(memories, size, start, T, H, R)
    of_tokens = x
    if tl.program_id(1) == 1:
        of_tokens = y
    row = n * of_rows + (tl.program_id(1) * size + t) * D
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        mask = exists[:, None] & (d < D)[None, :]
        source, target = of_tokens + token[:, None] * D + d[None, :], rows + row[:, None] + d[None, :]
        if GATHER:
            tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)
        else:
            moved = sign * tl.load(target, mask=mask, other=0.0).to(tl.float32)
            tl.store(source, moved.to(x.dtype.element_ty), mask=mask)


@triton.jit
def hidden_kernel(
    ac,  # (rows, 2 F)
    h,  # (rows, F)
    rows,
    F: tl.constexpr,
    SILU: tl.constexpr,
    R: tl.constexpr,
    BF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    for first in range(0, F, BF):
        f = first + tl.arange(0, BF)
        mask = (row < rows)[:, None] & (f < F)[None, :]
        at = ac + row[:, None] * (2 * F) + f[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        value, _, _ = activation(a, SILU)
        tl.store(h + row[:, None] * F + f[None, :], (value * c).to(h.dtype.element_ty), mask=mask)


@triton.jit
def hidden_back_kernel(
    by_h,  # (N, r, F)
    ac,  # (N, 2 size, 2 F), of which the last r
    by_ac,  # (N, r, 2 F)
    h,  # (N, r, F)
    rows,
    r,
    known,  # rows of a memory that are added to, and whose h there is
    size,
    F: tl.constexpr,
    SILU: tl.constexpr,
    R: tl.constexpr,
    BF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    n, t = row // r, row % r
    take = ((n + 1) * (2 * size) - r + t) * (2 * F)
    for first in range(0, F, BF):
        f = first + tl.arange(0, BF)
        mask = (row < rows)[:, None] & (f < F)[None, :]
        old = mask & (t < known)[:, None]
        at = row[:, None] * F + f[None, :]
        grad = tl.load(by_h + at, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(ac + take[:, None] + f[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(ac + take[:, None] + F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        into = by_ac + row[:, None] * (2 * F) + f[None, :]
        by_a = tl.load(into, mask=old, other=0.0).to(tl.float32)
        by_c = tl.load(into + F, mask=old, other=0.0).to(tl.float32)
        value, slope, _ = activation(a, SILU)
        tl.store(into, (by_a + grad * c * slope).to(by_ac.dtype.element_ty), mask=mask)
        tl.store(into + F, (by_c + grad * value).to(by_ac.dtype.element_ty), mask=mask)
        tl.store(h + at, (value * c).to(h.dtype.element_ty), mask=mask & (t >= known)[:, None])


@triton.jit
def gradients_kernel(
    dh,  # (N, size, F)
    ac,  # (N, 2 size, 2 F)
    through,  # (N, size, P, 2, F), if BACK, as h and all that begins with by_
    writes,  # (2, P, B, T, H)
    by_writes,
    weighted,  # (N, size, P, 2, F)
    by_dh,  # (N, size, F)
    by_ac,  # (N, 2 size, 2 F)
    h,  # (N, 2 size, F)
    memories,
    size,
    start,
    T,
    write_l,
    by_l,
    H: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
    SILU: tl.constexpr,
    BACK: tl.constexpr,
    R: tl.constexpr,
    BF: tl.constexpr,
):
    n, t, token, exists = _place(memories, size, start, T, H, R)
    row, key = n * size + t, n * (2 * size) + t
    part = memories * T  # B · T · H
    gate = writes + token
    G_a, G_c = _load(gate, exists), _load(gate + write_l, exists)
    if P == 2:
        N_a, N_c = _load(gate + part, exists), _load(gate + part + write_l, exists)
    of_G_a = tl.zeros([R], tl.float32)
    of_G_c = tl.zeros([R], tl.float32)
    of_N_a = tl.zeros([R], tl.float32)
    of_N_c = tl.zeros([R], tl.float32)
    for first in range(0, F, BF):
        f = first + tl.arange(0, BF)
        mask = exists[:, None] & (f < F)[None, :]
        d = tl.load(dh + row[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        of_key = key[:, None] * (2 * F) + f[None, :]
        a = tl.load(ac + of_key, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(ac + of_key + F, mask=mask, other=0.0).to(tl.float32)
        value, slope, curve = activation(a, SILU)
        of_a, of_c = d * c * slope, d * value
        at = row[:, None] * (2 * P * F) + f[None, :]
        kind = weighted.dtype.element_ty
        tl.store(weighted + at, (G_a * of_a).to(kind), mask=mask)
        tl.store(weighted + at + F, (G_c * of_c).to(kind), mask=mask)
        if P == 2:
            tl.store(weighted + at + 2 * F, (N_a * of_a).to(kind), mask=mask)
            tl.store(weighted + at + 3 * F, (N_c * of_c).to(kind), mask=mask)
        if BACK:
            tl.store(h + key[:, None] * F + f[None, :], (value * c).to(kind), mask=mask)
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
            tl.store(by_dh + row[:, None] * F + f[None, :], (by_a * c * slope + by_c * value).to(kind), mask=mask)
            tl.store(by_ac + of_key, (d * (by_a * c * curve + by_c * slope)).to(kind), mask=mask)
            tl.store(by_ac + of_key + F, (d * by_a * slope).to(kind), mask=mask)
    if BACK:
        gate = by_writes + token
        tl.store(gate, of_G_a, mask=exists)
        tl.store(gate + by_l, of_G_c, mask=exists)
        if P == 2:
            tl.store(gate + part, of_N_a, mask=exists)
            tl.store(gate + part + by_l, of_N_c, mask=exists)


@triton.jit
def errors_kernel(
    e,  # (N, size, V)
    through,  # (N, size, P, V), if BACK; else y (N, r, V)
    v,  # (B, T, H, V), if not BACK, as o
    o,
    writes,  # (1, P, B, T, H)
    by_writes,  # if BACK
    weighted,  # (N, size, P, V)
    by_e,  # (N, r, V), if BACK
    memories,
    size,
    start,
    T,
    r,
    H: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BACK: tl.constexpr,
    R: tl.constexpr,
    BV: tl.constexpr,
):
    n, t, token, exists = _place(memories, size, start, T, H, R)
    row, part = n * size + t, memories * T
    kind = weighted.dtype.element_ty
    G = _load(writes + token, exists)
    if P == 2:
        N = _load(writes + part + token, exists)
    of_G = tl.zeros([R], tl.float32)
    of_N = tl.zeros([R], tl.float32)
    for first in range(0, V, BV):
        i = first + tl.arange(0, BV)
        mask = exists[:, None] & (i < V)[None, :]
        if BACK:
            error = tl.load(e + row[:, None] * V + i[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            of_token = token[:, None] * V + i[None, :]
            error = -tl.load(v + of_token, mask=mask, other=0.0).to(tl.float32)
            key = through + (n * r + t)[:, None] * V + i[None, :]
            if OF_KEYS:
                error += tl.load(key, mask=mask, other=0.0).to(tl.float32)
            tl.store(o + of_token, tl.load(key + (r - size) * V, mask=mask, other=0.0), mask=mask)
            tl.store(e + row[:, None] * V + i[None, :], error.to(kind), mask=mask)
            error = error.to(kind).to(tl.float32)
        at = row[:, None] * (P * V) + i[None, :]
        tl.store(weighted + at, (G * error).to(kind), mask=mask)
        if P == 2:
            tl.store(weighted + at + V, (N * error).to(kind), mask=mask)
        if BACK:
            x = tl.load(through + at, mask=mask, other=0.0).to(tl.float32)
            of_G -= tl.sum(x * error, axis=1)
            by = -G * x
            if P == 2:
                x = tl.load(through + at + V, mask=mask, other=0.0).to(tl.float32)
                of_N -= tl.sum(x * error, axis=1)
                by -= N * x
            tl.store(by_e + (n * r + t)[:, None] * V + i[None, :], by.to(kind), mask=mask)
    if BACK:
        tl.store(by_writes + token, of_G, mask=exists)
        if P == 2:
            tl.store(by_writes + part + token, of_N, mask=exists)


def gather(of_tokens: Sequence[torch.Tensor], start: int, rows: torch.Tensor) -> None:
    _move(of_tokens, rows, start, 1, True)


def spread(rows: torch.Tensor, start: int, of_tokens: Sequence[torch.Tensor], sign: int = 1) -> None:
    _move(of_tokens, rows, start, sign, False)


def _move(of_tokens: Sequence[torch.Tensor], rows: torch.Tensor, start: int, sign: int, gather: bool) -> None:
    (_, T, H, D), N, size = of_tokens[0].shape, len(rows), rows.shape[1] // len(of_tokens)
    programs, options = _of_rows(N * size, D=D)
    move_kernel[programs, len(of_tokens)](
        of_tokens[0], of_tokens[-1], rows, rows.stride(0), N, size, start, T, sign, H=H, GATHER=gather, **options
    )


def hidden(ac: torch.Tensor, h: torch.Tensor, silu: bool) -> None:
    N, r, F = h.shape
    programs, options = _of_rows(N * r, F=F)
    hidden_kernel[(programs,)](ac, h, N * r, SILU=silu, **options)


def hidden_back(
    by_h: torch.Tensor, ac: torch.Tensor, by_ac: torch.Tensor, h: torch.Tensor, known: int, silu: bool
) -> None:
    N, r, F = h.shape
    programs, options = _of_rows(N * r, F=F)
    hidden_back_kernel[(programs,)](by_h, ac, by_ac, h, N * r, r, known, ac.shape[1] // 2, SILU=silu, **options)


def gradients(
    dh: torch.Tensor, ac: torch.Tensor, writes: torch.Tensor, start: int, weighted: torch.Tensor, silu: bool
) -> None:
    _gradients(dh, ac, dh, writes, start, writes, weighted, dh, ac, dh, silu, back=False)


def gradients_back(
    dh: torch.Tensor,
    ac: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_dh: torch.Tensor,
    by_ac: torch.Tensor,
    h: torch.Tensor,
    silu: bool,
) -> None:
    _gradients(dh, ac, through, writes, start, by_writes, weighted, by_dh, by_ac, h, silu, back=True)


def _gradients(
    dh: torch.Tensor,
    ac: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_dh: torch.Tensor,
    by_ac: torch.Tensor,
    h: torch.Tensor,
    silu: bool,
    back: bool,
) -> None:
    (N, size, F), (T, H), P = dh.shape, writes.shape[3:], weighted.shape[-1] // (2 * dh.shape[-1])
    programs, options = _of_rows(N * size, F=F)
    gradients_kernel[(programs,)](
        dh, ac, through, writes, by_writes, weighted, by_dh, by_ac, h, N, size, start, T, writes.stride(0),
        by_writes.stride(0), H=H, P=P, SILU=silu, BACK=back, **options | {"num_warps": 2 * WARPS if back else WARPS},
    )  # fmt: skip


def errors(
    y: torch.Tensor,
    v: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    e: torch.Tensor,
    o: torch.Tensor,
    weighted: torch.Tensor,
) -> None:
    _errors(e, y, v, o, writes, start, writes, weighted, e, y.shape[1], back=False)


def errors_back(
    e: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_e: torch.Tensor,
) -> None:
    _errors(e, through, e, e, writes, start, by_writes, weighted, by_e, by_e.shape[1], back=True)


def _errors(
    e: torch.Tensor,
    through: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_e: torch.Tensor,
    r: int,
    back: bool,
) -> None:
    (N, size, V), (T, H), P = e.shape, writes.shape[3:], weighted.shape[-1] // e.shape[-1]
    programs, options = _of_rows(N * size, V=V)
    errors_kernel[(programs,)](
        e, through, v, o, writes, by_writes, weighted, by_e, N, size, start, T, r,
        H=H, P=P, OF_KEYS=r > size, BACK=back, **options,
    )  # fmt: skip


def _of_rows(rows: int, **columns: int) -> tuple[int, dict[str, Any]]:
    """The programs for so many rows, and the options of a kernel that names its columns so."""
    ((name, size),) = columns.items()
    block = min(power_of_2_from(size), MOST)
    R = BLOCK // block
    return ceil_div(rows, R), {name: size, "R": R, f"B{name}": block, "num_warps": WARPS}


IN_TRITON = Passes(
    gather, spread, hidden, hidden_back, errors, errors_back, gradients, gradients_back, blocks, step, step_back
)
