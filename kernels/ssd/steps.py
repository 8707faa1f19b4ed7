"""The step sizes of the backends in torch."""

import torch
from torch.nn import functional as F


def step_sizes(x: torch.Tensor, dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """Δ = softplus(dt + bias), or without the softplus, (B, T, H) in float32, or float64 if `x` is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(dtype)
    if bias is not None:
        dt = dt + bias.to(dtype)
    return F.softplus(dt) if softplus else dt
