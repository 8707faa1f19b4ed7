"""The gated RMSNorm in Triton: one pass over the data each way.

A *row* is what one mean square is taken over: the C = D / groups channels of one group of one vector of x. A program
holds R rows in registers. The forward kernel leaves 1 / root-mean-square of every row, from which the backward kernel
computes all else again.

With n the normalised row and δ the gradient of n,  dL/d(input of the norm) = (δ − n · mean(δ n)) / rms.

The backward programs go through many rows of one group each, and add up their share of the weight's gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due, rounding
from riverrun.kernels.common.triton_math import sigmoid
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.gated_rms_norm.reference import gated_rms_norm_reference

ELEMENTS = 2048  # of a program, at least: rows × channels
FORWARD_PER_THREAD, BACKWARD_PER_THREAD = 16, 8  # elements
MAX_WARPS = 16
BACKWARD_PROGRAMS = 4  # a multiprocessor
# the backward kernel loads rows ahead into shared memory: up to so many steps of its loop, in up to so many bytes
BACKWARD_AHEAD, BACKWARD_BYTES = 2, 112 * 1024


@triton.jit
def _row_offset(row, stride, group, C: tl.constexpr, G: tl.constexpr, H: tl.constexpr):
    """Where row `row` of a group starts, if there are H · G rows one after another every `stride` elements."""
    return (row // H).to(tl.int64) * stride + ((row % H) * G + group) * C


@triton.jit
def _load_weight(p, c, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """For every row: a weight (1, BC) would get a layout of its own, and force it upon the rows."""
    c = c + tl.zeros([R, BC], tl.int32)
    return tl.load(p + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    gate,
    weight,  # (G · C,)
    y,  # contiguous
    rstd,  # (G, rows) float32
    rows,  # of each group
    x_stride,
    gate_stride,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    GATED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
):
    group = tl.program_id(0) % G
    row = (tl.program_id(0) // G) * R + tl.arange(0, R)[:, None]
    c = tl.arange(0, BC)[None, :]
    mask = (row < rows) & (c < C)
    u = tl.load(x + _row_offset(row, x_stride, group, C, G, H) + c, mask=mask, other=0.0).to(tl.float32)
    w = _load_weight(weight + group * C, c, C, R, BC)
    if GATED:
        z = tl.load(gate + _row_offset(row, gate_stride, group, C, G, H) + c, mask=mask, other=0.0).to(tl.float32)
        z *= sigmoid(z)
        if not NORM_FIRST:
            u *= z
    scale = tl.rsqrt(tl.sum(u * u, 1, keep_dims=True) / C + eps)
    u *= scale * w
    if GATED and NORM_FIRST:
        u *= z
    tl.store(y + _row_offset(row, H * G * C, group, C, G, H) + c, u.to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + group.to(tl.int64) * rows + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_y,
    x,
    gate,
    weight,
    rstd,
    grad_x,  # contiguous
    grad_gate,  # contiguous
    shares,  # (programs / G, G · C) float32: each program's share of the weight's gradient
    rows,
    grad_stride,
    x_stride,
    gate_stride,
    C: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    GATED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    group = tl.program_id(0) % G
    part = tl.program_id(0) // G
    parts = tl.num_programs(0) // G
    c = tl.arange(0, BC)[None, :]
    w = _load_weight(weight + group * C, c, C, R, BC)
    total = tl.zeros([R, BC], tl.float32)
    for first in tl.range(part * R, rows, parts * R, num_stages=STAGES):
        row = first + tl.arange(0, R)[:, None]
        mask = (row < rows) & (c < C)
        dy = tl.load(grad_y + _row_offset(row, grad_stride, group, C, G, H) + c, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(x + _row_offset(row, x_stride, group, C, G, H) + c, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + group.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
        out = _row_offset(row, H * G * C, group, C, G, H) + c
        n *= scale
        if GATED:
            z = tl.load(gate + _row_offset(row, gate_stride, group, C, G, H) + c, mask=mask, other=0.0).to(tl.float32)
            s = sigmoid(z)
            slope = s * (1.0 + z * (1.0 - s))
            z *= s
            if NORM_FIRST:
                tl.store(grad_gate + out, (dy * n * w * slope).to(grad_gate.dtype.element_ty), mask=mask)
                dy *= z
            else:
                slope *= n  # x / rms · silu′: the norm's input has x · silu
                n *= z
        total += dy * n
        dy *= w
        dy -= n * (tl.sum(dy * n, 1, keep_dims=True) / C)
        if GATED and not NORM_FIRST:
            tl.store(grad_gate + out, (dy * slope).to(grad_gate.dtype.element_ty), mask=mask)
            dy *= z
        tl.store(grad_x + out, (dy * scale).to(grad_x.dtype.element_ty), mask=mask)
    c = tl.arange(0, BC)
    tl.store(shares + (part * G + group).to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, T, …, D) → (B·T, … · D), (…, D) → (…, D) with fewer dimensions; neighbours in memory where they are in the
    last one. A view where the strides allow it, as they do in a slice of a projection's output."""
    tokens = x.reshape(x.shape[:2].numel(), -1) if x.dim() > 3 else x.reshape(-1, x.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def _shape(tokens: torch.Tensor, D: int, groups: int) -> dict[str, int]:
    C = D // groups
    BC = power_of_2_from(C)
    return {"C": C, "G": groups, "H": tokens.shape[1] // D, "BC": BC, "R": max(1, ELEMENTS // BC)}


def _warps(shape: dict[str, int], per_thread: int) -> int:
    return min(MAX_WARPS, max(1, shape["R"] * shape["BC"] // (32 * per_thread)))


def _stages(shape: dict[str, int], *loaded: torch.Tensor | None) -> int:
    step = shape["R"] * shape["BC"] * sum(t.element_size() for t in loaded if t is not None)
    return 1 + min(BACKWARD_AHEAD, BACKWARD_BYTES // step)


def norm(
    x: torch.Tensor, gate: torch.Tensor | None, weight: torch.Tensor, eps: float, groups: int, norm_before_gate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ y in the shape and dtype of `x`, contiguous, and 1 / root-mean-square (groups, rows) in float32."""
    tokens = _tokens(x)
    gates = tokens if gate is None else _tokens(gate)
    D = x.shape[-1]
    shape = _shape(tokens, D, groups)
    rows = x.numel() // D
    y, rstd = x.new_empty(x.shape), x.new_empty(groups, rows, dtype=torch.float32)
    forward_kernel[(groups * ceil_div(rows, shape["R"]),)](
        tokens, gates, weight, y, rstd, rows, tokens.stride(0), gates.stride(0), eps,
        GATED=gate is not None, NORM_FIRST=norm_before_gate, num_warps=_warps(shape, FORWARD_PER_THREAD), **shape,
    )  # fmt: skip
    return y, rstd


def norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    norm_before_gate: bool,
    programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of x, of the gate (empty if there is none), and of the weight in float32; by default from as many
    programs a group as fill the device."""
    tokens, grads = _tokens(x), _tokens(grad_y)
    gates = tokens if gate is None else _tokens(gate)
    shape = _shape(tokens, x.shape[-1], groups)
    rows = rstd.shape[1]
    if programs is None:
        programs = ceil_div(BACKWARD_PROGRAMS * multiprocessors(x), groups)
    parts = min(ceil_div(rows, shape["R"]), programs)
    grad_x = x.new_empty(x.shape)
    grad_gate = grad_x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    shares = x.new_empty(parts, x.shape[-1], dtype=torch.float32)
    backward_kernel[(parts * groups,)](
        grads, tokens, gates, weight, rstd, grad_x, grad_gate, shares,
        rows, grads.stride(0), tokens.stride(0), gates.stride(0),
        GATED=gate is not None, NORM_FIRST=norm_before_gate, num_warps=_warps(shape, BACKWARD_PER_THREAD),
        STAGES=_stages(shape, grad_y, x, gate), **shape,
    )  # fmt: skip
    return grad_x, grad_gate, shares.sum(0)


def check(x: torch.Tensor, gated: bool, weight: torch.Tensor, eps: float, groups: int, norm_before_gate: bool) -> None:
    """The self-check of the kernels for such tensors."""
    D, heads = x.shape[-1], x.shape[2:-1].numel()

    def compare() -> float:
        draw = draws(x.device)
        R = max(1, ELEMENTS // power_of_2_from(D // groups))
        shape = 1, ceil_div(5 * R + 1, heads), heads, D  # three steps of the backward loop, the last one short
        u, w, upstream = draw(shape).to(x.dtype), draw(D).to(weight.dtype), draw(shape).to(x.dtype)
        gate = draw(shape).to(x.dtype) if gated else None
        y, rstd = norm(u, gate, w, eps, groups, norm_before_gate)
        grad_x, grad_gate, grad_w = norm_backward(upstream, u, gate, w, rstd, groups, norm_before_gate, 2)

        def in_torch(x, gate, weight):
            return [gated_rms_norm_reference(x, gate, weight, eps, groups, norm_before_gate)]

        got = [y, grad_x, grad_gate, grad_w] if gated else [y, grad_x, grad_w]
        return deviation(got, in_double(in_torch, (u, gate, w), upstream))

    sizes: dict[str, object] = {
        "D": D,
        "groups": groups,
        "heads": heads,
        "gate": gated,
        "norm_before_gate": norm_before_gate,
    }
    sizes |= {"dtype": x.dtype, "parameters": weight.dtype}
    check_once("gated_rms_norm", sizes, x.device, compare, rounding(x.dtype))


@operator("gated_rms_norm_triton")
def _forward(
    x: torch.Tensor, gate: torch.Tensor | None, weight: torch.Tensor, eps: float, groups: int, norm_before_gate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if is_due(x):
        check(x, gate is not None, weight, eps, groups, norm_before_gate)
    return norm(x, gate, weight, eps, groups, norm_before_gate)


@_forward.register_fake
def _(x, gate, weight, eps, groups, norm_before_gate):
    return x.new_empty(x.shape), x.new_empty(groups, x.numel() // x.shape[-1], dtype=torch.float32)


@operator("gated_rms_norm_triton_backward")
def _backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    norm_before_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return norm_backward(grad_y, x, gate, weight, rstd, groups, norm_before_gate)


@_backward.register_fake
def _(grad_y, x, gate, weight, rstd, groups, norm_before_gate):
    grad_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), grad_gate, x.new_empty(x.shape[-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gate, weight, _, ctx.groups, ctx.norm_before_gate = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate, weight, output[1])


def _gradient(ctx: Any, grad_y: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    x, gate, weight, rstd = ctx.saved_tensors
    grad_x, grad_gate, grad_weight = _backward(grad_y, x, gate, weight, rstd, ctx.groups, ctx.norm_before_gate)
    return grad_x, None if gate is None else grad_gate, grad_weight.to(weight.dtype), None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def gated_rms_norm_triton(
    x: torch.Tensor, gate: torch.Tensor | None, weight: torch.Tensor, eps: float, groups: int, norm_before_gate: bool
) -> torch.Tensor:
    """`riverrun.kernels.gated_rms_norm.gated_rms_norm`."""
    return _forward(x, gate, weight.contiguous(), eps, groups, norm_before_gate)[0]
