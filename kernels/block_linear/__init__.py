"""A block-diagonal linear map to several gates, written straight into the layout that the recurrences read."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from riverrun.kernels.common.backend import check_shape


def block_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """u[b, t, g, (h, j)] = Σ_i x[b, t, (h, i)] weight[h, i, g, j]: H independent maps (ParaRNN, arXiv 2510.21450).

    One batched matrix product a gate, over the heads: its result lands in the channels of its gate, and no transpose
    follows. No bias: the recurrences add it on the fly.

    Args:
        x: (B, T, H · I).
        weight: (H, I, G, J).

    Returns:
        (B, T, G, H · J) in the dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape.
    """
    if weight.dim() != 4:
        raise ValueError(f"block_linear: weight must have shape (H, I, G, J), got {tuple(weight.shape)}")
    H, I, G, J = weight.shape
    if x.dim() != 3:
        raise ValueError(f"block_linear: x must have shape (B, T, H · I), got {tuple(x.shape)}")
    B, T, _ = x.shape
    check_shape("block_linear", "x", x, (B, T, H * I), "(B, T, H · I)")
    return _BlockLinear.apply(x.reshape(B * T, H, I), weight).view(B, T, G, H * J)


class _BlockLinear(torch.autograd.Function):
    """x (N, H, I), weight (H, I, G, J) → (N, G, H, J). In products the heads come first, as the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        (N, H, _), (_, _, G, J) = x.shape, weight.shape
        out = x.new_empty(N, G, H, J)
        for g in range(G):
            torch.bmm(x.transpose(0, 1), weight[:, :, g], out=out[:, g].transpose(0, 1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        gates = [grad[:, g].transpose(0, 1) for g in range(weight.shape[2])]  # (H, N, J) each
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            by_head = grad_x.transpose(0, 1)
            torch.bmm(gates[0], weight[:, :, 0].mT, out=by_head)
            for g in range(1, len(gates)):
                by_head.baddbmm_(gates[g], weight[:, :, g].mT)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for g, grad_g in enumerate(gates):
                torch.bmm(x.permute(1, 2, 0), grad_g, out=grad_weight[:, :, g])
        return grad_x, grad_weight
