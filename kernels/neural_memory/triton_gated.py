"""`gated.py` in one pass each; elementwise, in float32."""

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.triton_math import exp, sigmoid
from riverrun.kernels.common.whole import ceil_div

BLOCK, WARPS = 2048, 4


@triton.jit
def activation(z, SILU: tl.constexpr):
    """φ, φ' and φ''."""
    if SILU:
        s = sigmoid(z)
        return z * s, s * (1.0 + z * (1.0 - s)), s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    else:
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        density = 0.3989422804014327 * exp(-0.5 * z * z)
        return z * below, below + z * density, density * (2.0 - z * z)


@triton.jit
def gated_kernel(a, c, h, N, SILU: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(a + i, mask=i < N, other=0.0).to(tl.float32)
    x = tl.load(c + i, mask=i < N, other=0.0).to(tl.float32)
    value, _, _ = activation(z, SILU)
    tl.store(h + i, (value * x).to(h.dtype.element_ty), mask=i < N)


@triton.jit
def gradients_kernel(grad, a, c, of_a, of_c, N, SILU: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + i, mask=i < N, other=0.0).to(tl.float32)
    z = tl.load(a + i, mask=i < N, other=0.0).to(tl.float32)
    x = tl.load(c + i, mask=i < N, other=0.0).to(tl.float32)
    value, first, _ = activation(z, SILU)
    tl.store(of_a + i, (g * x * first).to(of_a.dtype.element_ty), mask=i < N)
    tl.store(of_c + i, (g * value).to(of_c.dtype.element_ty), mask=i < N)


@triton.jit
def second_kernel(by_a, by_c, grad, a, c, of_grad, of_a, of_c, N, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of `gradients_kernel`'s inputs, from those of what it makes."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(by_a + i, mask=i < N, other=0.0).to(tl.float32)
    w = tl.load(by_c + i, mask=i < N, other=0.0).to(tl.float32)
    g = tl.load(grad + i, mask=i < N, other=0.0).to(tl.float32)
    z = tl.load(a + i, mask=i < N, other=0.0).to(tl.float32)
    x = tl.load(c + i, mask=i < N, other=0.0).to(tl.float32)
    value, first, second = activation(z, SILU)
    tl.store(of_grad + i, (u * x * first + w * value).to(of_grad.dtype.element_ty), mask=i < N)
    tl.store(of_a + i, (g * (u * x * second + w * first)).to(of_a.dtype.element_ty), mask=i < N)
    tl.store(of_c + i, (u * g * first).to(of_c.dtype.element_ty), mask=i < N)


def run_gated(a: torch.Tensor, c: torch.Tensor, activation: str) -> torch.Tensor:
    (h,) = _run(gated_kernel, (a, c), 1, activation)
    return h


def run_gradients(grad: torch.Tensor, a: torch.Tensor, c: torch.Tensor, activation: str) -> tuple[torch.Tensor, ...]:
    return _run(gradients_kernel, (grad, a, c), 2, activation)


def run_second(
    by_a: torch.Tensor, by_c: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, c: torch.Tensor, activation: str
) -> tuple[torch.Tensor, ...]:
    return _run(second_kernel, (by_a, by_c, grad, a, c), 3, activation)


def _run(kernel, inputs: tuple[torch.Tensor, ...], outputs: int, activation: str) -> tuple[torch.Tensor, ...]:
    inputs = tuple(x.contiguous() for x in inputs)
    made = tuple(torch.empty_like(inputs[0]) for _ in range(outputs))
    N = inputs[0].numel()
    kernel[(ceil_div(N, BLOCK),)](*inputs, *made, N, SILU=activation == "silu", BLOCK=BLOCK, num_warps=WARPS)
    return made
