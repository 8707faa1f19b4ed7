"""The gates in Triton: one pass over the logits each way, of all gates together.

A program holds R tokens × BN gates. The backward programs go through many blocks of tokens, and add up their share of
the biases' gradients. With s = σ(t) and everything from the logits again:

    dL/da = −σ(a) dL/dlog(1 − α)        dL/dt = θ (1 − s) dL/dθ        dL/de = (1 − η) dL/dlog η − η θ dL/dθ

the last term only if steps shrink.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due, rounding
from riverrun.kernels.common.triton_math import exp, reciprocal, sigmoid
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.memory_gates.reference import memory_gates_reference

ELEMENTS = 1024  # of a block: tokens × gates
MOST_GATES = 64  # of a block
WARPS = 4
BACKWARD_PROGRAMS = 2  # a multiprocessor

Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def _log_sigmoid(x):
    """log σ(x) = min(x, 0) − log(1 + w), w = e^−|x|, to its own last digits also where it is near 0: 1 + w would lose
    those of w. log(1 + w) = 2 artanh z, z = w / (2 + w) ≤ 1/3, whose series is cut off below 2e-8 of it."""
    w = exp(-tl.abs(x))
    z = w * reciprocal(2.0 + w)
    s = z * z
    series = 1.0 / 11 + s * (1.0 / 13)
    series = 1.0 / 7 + s * (1.0 / 9 + s * series)
    series = 1.0 + s * (1.0 / 3 + s * (1.0 / 5 + s * series))
    return tl.minimum(x, 0.0) - 2.0 * z * series


@triton.jit
def _logits(x, bias, row, rows, stride, n, N: tl.constexpr):
    """(R, BN) of tokens `row` (R, 1), with their bias; zeros where there is none."""
    mask = (row < rows) & (n < N)
    logits = tl.load(x + row.to(tl.int64) * stride + n, mask=mask, other=0.0).to(tl.float32)
    return logits + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    alpha,  # (rows, N) each, rows `…_stride` apart
    theta,
    eta,
    alpha_bias,  # (N,) each
    theta_bias,
    eta_bias,
    log_keep,  # (rows, N) float32 each
    lr,
    log_momentum,
    rows,
    alpha_stride,
    theta_stride,
    eta_stride,
    scale,
    N: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SHRINK: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    at, mask = row.to(tl.int64) * N + n, (row < rows) & (n < N)
    step = sigmoid(_logits(theta, theta_bias, row, rows, theta_stride, n, N)) * scale
    if MOMENTUM:
        e = _logits(eta, eta_bias, row, rows, eta_stride, n, N)
        tl.store(log_momentum + at, _log_sigmoid(e), mask=mask)
        if SHRINK:
            step *= sigmoid(-e)
    tl.store(lr + at, step, mask=mask)
    tl.store(log_keep + at, _log_sigmoid(-_logits(alpha, alpha_bias, row, rows, alpha_stride, n, N)), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_log_keep,  # (rows, N) float32 each
    grad_lr,
    grad_log_momentum,
    alpha,  # from here on as in the forward kernel
    theta,
    eta,
    alpha_bias,
    theta_bias,
    eta_bias,
    grad_alpha,  # (rows, N) each
    grad_theta,
    grad_eta,
    shares,  # (programs, 3, N) float32: each program's share of the biases' gradients
    rows,
    alpha_stride,
    theta_stride,
    eta_stride,
    scale,
    N: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SHRINK: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    by_alpha = tl.zeros([R, BN], tl.float32)
    by_theta = tl.zeros([R, BN], tl.float32)
    by_eta = tl.zeros([R, BN], tl.float32)
    for first in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = first + tl.arange(0, R)[:, None]
        at, mask = row.to(tl.int64) * N + n, (row < rows) & (n < N)
        a = _logits(alpha, alpha_bias, row, rows, alpha_stride, n, N)
        g = -sigmoid(a) * tl.load(grad_log_keep + at, mask=mask, other=0.0)
        tl.store(grad_alpha + at, g.to(grad_alpha.dtype.element_ty), mask=mask)
        by_alpha += g
        t = _logits(theta, theta_bias, row, rows, theta_stride, n, N)
        of_step = tl.load(grad_lr + at, mask=mask, other=0.0) * sigmoid(t) * scale
        if MOMENTUM:
            e = _logits(eta, eta_bias, row, rows, eta_stride, n, N)
            left = sigmoid(-e)
            g = left * tl.load(grad_log_momentum + at, mask=mask, other=0.0)
            if SHRINK:
                of_step *= left
                g -= of_step * sigmoid(e)
            tl.store(grad_eta + at, g.to(grad_eta.dtype.element_ty), mask=mask)
            by_eta += g
        g = of_step * sigmoid(-t)
        tl.store(grad_theta + at, g.to(grad_theta.dtype.element_ty), mask=mask)
        by_theta += g
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    share = shares + tl.program_id(0).to(tl.int64) * (3 * N) + n
    tl.store(share, tl.sum(by_alpha, 0), mask=n < N)
    tl.store(share + N, tl.sum(by_theta, 0), mask=n < N)
    tl.store(share + 2 * N, tl.sum(by_eta, 0), mask=n < N)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, T, N) → (B·T, N) with neighbouring gates: a view where the strides allow it, as they do in a slice of a
    projection's output."""
    rows = x.reshape(-1, x.shape[2])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _block(N: int) -> dict[str, int]:
    BN = min(MOST_GATES, power_of_2_from(N))
    return {"N": N, "BN": BN, "R": ELEMENTS // BN, "num_warps": WARPS}


def gates(
    alpha: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor | None,
    alpha_bias: torch.Tensor,
    theta_bias: torch.Tensor,
    eta_bias: torch.Tensor | None,
    scale: float,
    shrink: bool,
) -> Made:
    """→ log(1 − α), θ and log η (empty without `eta`), (B, T, N) float32."""
    inputs = [_tokens(alpha if x is None else x) for x in (alpha, theta, eta)]
    biases = alpha_bias, theta_bias, alpha_bias if eta_bias is None else eta_bias
    made = _made(alpha, eta)
    rows, block = len(inputs[0]), _block(alpha.shape[2])
    forward_kernel[(ceil_div(rows, block["R"]), ceil_div(block["N"], block["BN"]))](
        *inputs, *biases, *made, rows, *(x.stride(0) for x in inputs), scale,
        MOMENTUM=eta is not None, SHRINK=shrink, **block,
    )  # fmt: skip
    return made


def _made(alpha: torch.Tensor, eta: torch.Tensor | None) -> Made:
    log_keep = alpha.new_empty(alpha.shape, dtype=torch.float32)
    log_momentum = log_keep.new_empty(0) if eta is None else torch.empty_like(log_keep)
    return log_keep, torch.empty_like(log_keep), log_momentum


def gates_backward(
    grad_log_keep: torch.Tensor,
    grad_lr: torch.Tensor,
    grad_log_momentum: torch.Tensor | None,
    alpha: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor | None,
    alpha_bias: torch.Tensor,
    theta_bias: torch.Tensor,
    eta_bias: torch.Tensor | None,
    scale: float,
    shrink: bool,
    programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of the logits (that of η empty without any), contiguous, and of the biases (3, N) in float32; by
    default from as many programs as fill the device."""
    inputs = [_tokens(alpha if x is None else x) for x in (alpha, theta, eta)]
    biases = alpha_bias, theta_bias, alpha_bias if eta_bias is None else eta_bias
    grads = grad_log_keep, grad_lr, grad_lr if grad_log_momentum is None else grad_log_momentum
    rows, block = len(inputs[0]), _block(alpha.shape[2])
    most = BACKWARD_PROGRAMS * multiprocessors(alpha) if programs is None else programs
    parts = min(ceil_div(rows, block["R"]), most)
    made = _gradients(alpha, theta, eta)
    shares = alpha.new_empty(parts, 3, block["N"], dtype=torch.float32)
    backward_kernel[(parts, ceil_div(block["N"], block["BN"]))](
        *grads, *inputs, *biases, *made, shares, rows, *(x.stride(0) for x in inputs), scale,
        MOMENTUM=eta is not None, SHRINK=shrink, **block,
    )  # fmt: skip
    return made[0], made[1], made[2], shares.sum(0)


def _gradients(alpha: torch.Tensor, *rest: torch.Tensor | None) -> list[torch.Tensor]:
    """Empty ones of the logits."""
    return [alpha.new_empty(0) if x is None else x.new_empty(x.shape) for x in (alpha, *rest)]


def check(alpha: torch.Tensor, bias: torch.Tensor, momentum: bool, shrink: bool) -> None:
    """The self-check of the kernels for such tensors."""
    N, block = alpha.shape[2], _block(alpha.shape[2])

    def compare() -> float:
        draw, count = draws(alpha.device), 3 if momentum else 2
        shape = 1, 3 * block["R"] + 1, N  # two steps of the backward loop, the last one short
        none = [None] * (3 - count)
        inputs: list[Any] = [draw(*shape).to(alpha.dtype) for _ in range(count)] + none
        inputs += [draw(N).to(bias.dtype) for _ in range(count)] + none
        options: list[Any] = [0.5, shrink]
        upstream: list[Any] = [draw(*shape) for _ in range(count)]
        programs: list[Any] = [2]

        def in_torch(*inputs: Any) -> list[torch.Tensor]:
            made = memory_gates_reference(inputs[:3], inputs[3:], 0.5, shrink)
            return [torch.cat([x.flatten() for x in made if x is not None])]

        made = gates(*inputs, *options)
        *by_logits, by_biases = gates_backward(*upstream, *none, *inputs, *options, *programs)
        got = [torch.cat([x.flatten() for x in made]), *by_logits[:count], *by_biases[:count]]
        flat = torch.cat([x.flatten() for x in upstream])
        return deviation(got, in_double(in_torch, inputs, flat))

    sizes: dict[str, object] = {"N": N, "momentum": momentum, "shrink": shrink}
    sizes |= {"dtype": alpha.dtype, "parameters": bias.dtype}
    check_once("memory_gates", sizes, alpha.device, compare, rounding(alpha.dtype))


@operator("memory_gates_triton")
def _forward(
    alpha: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor | None,
    alpha_bias: torch.Tensor,
    theta_bias: torch.Tensor,
    eta_bias: torch.Tensor | None,
    scale: float,
    shrink: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if is_due(alpha):
        check(alpha, alpha_bias, eta is not None, shrink)
    return gates(alpha, theta, eta, alpha_bias, theta_bias, eta_bias, scale, shrink)


@_forward.register_fake
def _(alpha, theta, eta, *_):
    return _made(alpha, eta)


@operator("memory_gates_triton_backward")
def _backward(
    grad_log_keep: torch.Tensor,
    grad_lr: torch.Tensor,
    grad_log_momentum: torch.Tensor | None,
    alpha: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor | None,
    alpha_bias: torch.Tensor,
    theta_bias: torch.Tensor,
    eta_bias: torch.Tensor | None,
    scale: float,
    shrink: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    biases = alpha_bias, theta_bias, eta_bias
    return gates_backward(grad_log_keep, grad_lr, grad_log_momentum, alpha, theta, eta, *biases, scale, shrink)


@_backward.register_fake
def _(grad_log_keep, grad_lr, grad_log_momentum, alpha, theta, eta, *_):
    shares = alpha.new_empty(3, alpha.shape[2], dtype=torch.float32)
    return *_gradients(alpha, theta, eta), shares


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.shrink = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    momentum = tensors[2] is not None
    log_keep, lr, log_momentum = (x.contiguous() for x in grads)
    *by_logits, by_biases = _backward(log_keep, lr, log_momentum if momentum else None, *tensors, ctx.scale, ctx.shrink)
    made = *by_logits, *(by.to(tensors[3].dtype) for by in by_biases.unbind())
    return *(None if x is None else by for x, by in zip(tensors, made)), None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def memory_gates_triton(
    alpha: torch.Tensor,
    theta: torch.Tensor,
    eta: torch.Tensor | None,
    alpha_bias: torch.Tensor,
    theta_bias: torch.Tensor,
    eta_bias: torch.Tensor | None,
    scale: float,
    shrink: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`riverrun.kernels.memory_gates.memory_gates`."""
    biases = (None if x is None else x.contiguous() for x in (alpha_bias, theta_bias, eta_bias))
    log_keep, lr, log_momentum = _forward(alpha, theta, eta, *biases, scale, shrink)
    return log_keep, lr, None if eta is None else log_momentum
