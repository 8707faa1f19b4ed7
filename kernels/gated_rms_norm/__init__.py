"""RMSNorm with a SiLU gate, before or after the normalisation, over groups of channels."""

import torch

from riverrun.kernels.common.backend import resolve_backend
from riverrun.kernels.gated_rms_norm.reference import gated_rms_norm_reference

# the Triton kernels keep a group in registers
TRITON_CHANNELS = 16_384


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """RMSNorm(x · silu(gate)) · weight (Mamba-2, arXiv 2405.21060), or RMSNorm(x) · weight · silu(gate) (gated
    DeltaNet, arXiv 2412.06464) with `norm_before_gate`. Arithmetic is float32 (float64 if `x` is float64).

    Args:
        x: (…, D). A norm for each head takes x (…, H, D) and one weight for all heads.
        gate: (…, D), or None for a plain RMSNorm.
        weight: (D,).
        eps: added to the mean square.
        groups: the mean square is taken over each of `groups` blocks of D / groups neighbouring channels.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`); the second and the third are the
            same. The Triton kernels are for groups of up to 16,384 channels.

    Returns:
        (…, D) in the dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape, `groups` that do not divide D, or a backend that there is not.
    """
    op = "gated_rms_norm"
    D = x.shape[-1]
    if weight.shape != (D,):
        raise ValueError(f"{op}: weight must have shape (D,) = ({D},), got {tuple(weight.shape)}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"{op}: gate must have the shape of x, {tuple(x.shape)}, got {tuple(gate.shape)}")
    if groups < 1 or D % groups:
        raise ValueError(f"{op}: groups={groups} must divide the {D} channels")
    fits = D // groups <= TRITON_CHANNELS
    if backend == "triton" and not fits:
        raise ValueError(
            f"{op}: the Triton kernel is for groups of up to {TRITON_CHANNELS} channels, got {D // groups}; "
            "use backend='chunked'"
        )
    chosen = resolve_backend(op, backend, x, x.numel() // D, has_triton=fits)
    if chosen == "triton" and x.numel():
        from riverrun.kernels.gated_rms_norm.triton_norm import gated_rms_norm_triton

        return gated_rms_norm_triton(x, gate, weight, eps, groups, norm_before_gate)
    return gated_rms_norm_reference(x, gate, weight, eps, groups, norm_before_gate)
