"""The gated norm as torch writes it."""

import torch
from torch.nn import functional as F


def gated_rms_norm_reference(
    x: torch.Tensor, gate: torch.Tensor | None, weight: torch.Tensor, eps: float, groups: int, norm_before_gate: bool
) -> torch.Tensor:
    """`riverrun.kernels.gated_rms_norm.gated_rms_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    gating = None if gate is None else F.silu(gate.to(dtype))
    if gating is not None and not norm_before_gate:
        y = y * gating
    y = F.rms_norm(y.unflatten(-1, (groups, -1)), (x.shape[-1] // groups,), eps=eps).flatten(-2) * weight.to(dtype)
    if gating is not None and norm_before_gate:
        y = y * gating
    return y.to(x.dtype)
