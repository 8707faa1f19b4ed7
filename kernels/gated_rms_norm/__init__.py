"""RMSNorm with a SiLU gate, before or after the normalisation, over groups of channels."""

import torch
from torch.nn import functional as F


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """RMSNorm(x · silu(gate)) · weight (Mamba-2, arXiv 2405.21060), or RMSNorm(x) · weight · silu(gate) (gated
    DeltaNet, arXiv 2412.06464) with `norm_before_gate`. Arithmetic is float32 (float64 if `x` is float64).

    Args:
        x: (…, D). A norm for each head takes x (…, H, D) and one weight for all heads.
        gate: (…, D), or None for a plain RMSNorm.
        weight: (D,).
        eps: added to the mean square.
        groups: the mean square is taken over each of `groups` blocks of D / groups neighbouring channels.

    Returns:
        (…, D) in the dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape, or `groups` that do not divide D.
    """
    D = x.shape[-1]
    if weight.shape != (D,):
        raise ValueError(f"gated_rms_norm: weight must have shape (D,) = ({D},), got {tuple(weight.shape)}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate must have the shape of x, {tuple(x.shape)}, got {tuple(gate.shape)}")
    if groups < 1 or D % groups:
        raise ValueError(f"gated_rms_norm: groups={groups} must divide the {D} channels")
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    gating = None if gate is None else F.silu(gate.to(dtype))
    if gating is not None and not norm_before_gate:
        y = y * gating
    y = F.rms_norm(y.unflatten(-1, (groups, -1)), (D // groups,), eps=eps).flatten(-2) * weight.to(dtype)
    if gating is not None and norm_before_gate:
        y = y * gating
    return y.to(x.dtype)
