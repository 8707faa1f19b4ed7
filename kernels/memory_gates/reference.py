"""The gates as torch writes them."""

import torch
from torch.nn import functional as F


def memory_gates_reference(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    scale: float,
    shrink: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`riverrun.kernels.memory_gates.memory_gates`."""
    alpha, theta, eta = (_sum(x, bias) for x, bias in zip(logits, biases))
    assert alpha is not None and theta is not None
    lr = theta.sigmoid() * scale
    if eta is None:
        return F.logsigmoid(-alpha), lr, None
    if shrink:
        left = 1 - eta.sigmoid()
        lr = lr * (left[..., None] if eta.dim() < theta.dim() else left)
    return F.logsigmoid(-alpha), lr, F.logsigmoid(eta)


def _sum(x: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    if x is None or bias is None:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = bias.to(dtype)
    return x.to(dtype) + (bias[:, None] if x.dim() == 4 else bias)
