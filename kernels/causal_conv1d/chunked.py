"""The convolution of whole sequences as W shifted products.

Every sequence is preceded by its initial state, W − 1 inputs, in one long row; then no tap needs a mask, and a
sequence's final state is the end of its stretch, also if it is shorter than the state.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from riverrun.kernels.causal_conv1d.reference import to_unit
from riverrun.kernels.common.chunks import sequence_bounds


def causal_conv1d_chunked(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    unit: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.causal_conv1d.causal_conv1d`; `initial_state` has the dtype of `x`."""
    T, tail = x.shape[1], weight.shape[1] - 1

    def convolve(row: torch.Tensor) -> torch.Tensor:
        y = _Convolution.apply(row, weight, bias, silu)
        return y if unit is None else to_unit(y, unit)

    if cu_seqlens is None:
        row = torch.cat([initial_state, x], dim=1)  # (B, W - 1 + T, D)
        return convolve(row).to(x.dtype), row[:, T:].contiguous()

    bounds = sequence_bounds(x, cu_seqlens).to(x.device)
    sequence = torch.arange(len(bounds) - 1, device=x.device)
    state_place = (bounds[:-1] + sequence * tail)[:, None] + torch.arange(tail, device=x.device)  # (S, W - 1)
    final_place = state_place + bounds.diff()[:, None]
    token = torch.arange(T, device=x.device)
    place = token + torch.searchsorted(bounds, token, right=True) * tail  # of each token in the long row
    source = torch.cat([state_place.flatten(), place]).argsort()
    row = torch.cat([initial_state.flatten(0, 1), x[0]]).index_select(0, source)  # (S (W - 1) + T, D)
    y = convolve(row[None])
    # the output at a token's place stands W - 1 places earlier
    y = y[0].index_select(0, place - tail)[None].to(x.dtype)
    return y, row.index_select(0, final_place.flatten()).view(len(bounds) - 1, tail, x.shape[2])


class _Convolution(torch.autograd.Function):
    """row (B, W − 1 + T, D), weight (D, W), bias (D,) → (B, T, D) in float32 or float64.

    Keeps the row and the input of the activation.
    """

    @staticmethod
    def forward(
        ctx: Any, row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
    ) -> torch.Tensor:
        dtype = torch.promote_types(row.dtype, torch.float32)
        W = weight.shape[1]
        T = row.shape[1] - W + 1
        inputs, taps = row.to(dtype), weight.to(dtype)
        y = inputs[:, :T] * taps[:, 0]
        for w in range(1, W):
            y.addcmul_(inputs[:, w : w + T], taps[:, w])
        if bias is not None:
            y += bias
        ctx.has_bias = bias is not None
        ctx.silu = silu
        ctx.save_for_backward(row, weight, *([y.to(row.dtype)] if silu else []))
        # rounded outside: torch 2.11 compiles a forward that ends in a conversion without effect to zero gradients
        return F.silu(y) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        row, weight, *before_silu = ctx.saved_tensors  # read once: a checkpointed tensor cannot be unpacked twice
        dtype = torch.promote_types(row.dtype, torch.float32)
        T, W = grad.shape[1], weight.shape[1]
        inputs, taps = row.to(dtype), weight.to(dtype)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, before_silu[0].to(dtype))
        grad_row = torch.zeros_like(inputs)
        grad_taps = []
        for w in range(W):
            grad_row[:, w : w + T].addcmul_(grad, taps[:, w])
            grad_taps.append((grad * inputs[:, w : w + T]).sum((0, 1)))
        grad_bias = grad.sum((0, 1)) if ctx.has_bias else None
        return grad_row.to(row.dtype), torch.stack(grad_taps, dim=1).to(weight.dtype), grad_bias, None
