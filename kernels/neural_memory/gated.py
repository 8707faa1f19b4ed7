"""h = φ(a) ∘ c of a gated memory, its gradient, and the gradient of that: a memory that learns by gradients takes the
second as a step of its forward pass. In long chunks matrix products take little longer than passes over memory, so that
each of the three is one pass on a GPU.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gated(a: torch.Tensor, c: torch.Tensor, activation: str) -> torch.Tensor:
    """φ(a) ∘ c."""
    return _Gated.apply(a, c, activation) if fused(a) else activate(a, activation) * c


def gated_gradients(
    grad: torch.Tensor, a: torch.Tensor, c: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of a and c, from that of h."""
    if fused(a):
        return _Gradients.apply(grad, a, c, activation)
    return grad * c * slope(a, activation), grad * activate(a, activation)


def activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    return F.gelu(z) if activation == "gelu" else F.silu(z)


def slope(z: torch.Tensor, activation: str) -> torch.Tensor:
    """φ'(z)."""
    if activation == "silu":
        s = z.sigmoid()
        return s * (1 + z * (1 - s))
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z.square()) * (0.5 / torch.pi) ** 0.5


def curve(z: torch.Tensor, activation: str) -> torch.Tensor:
    """φ''(z)."""
    if activation == "silu":
        s = z.sigmoid()
        return s * (1 - s) * (2 + z * (1 - 2 * s))
    return torch.exp(-0.5 * z.square()) * (0.5 / torch.pi) ** 0.5 * (2 - z.square())


def fused(a: torch.Tensor) -> bool:
    return a.is_cuda and a.dtype in (torch.bfloat16, torch.float16, torch.float32)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, c: torch.Tensor, activation: str) -> torch.Tensor:
        from riverrun.kernels.neural_memory.triton_gated import run_gated

        ctx.save_for_backward(a, c)
        ctx.activation = activation
        return run_gated(a, c, activation)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_Gradients.apply(grad, *ctx.saved_tensors, ctx.activation), None


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, a: torch.Tensor, c: torch.Tensor, activation: str):
        from riverrun.kernels.neural_memory.triton_gated import run_gradients

        ctx.save_for_backward(grad, a, c)
        ctx.activation = activation
        return run_gradients(grad, a, c, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_a: torch.Tensor, by_c: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from riverrun.kernels.neural_memory.triton_gated import run_second

        grad, a, c = ctx.saved_tensors
        return *run_second(by_a, by_c, grad, a, c, ctx.activation), None
