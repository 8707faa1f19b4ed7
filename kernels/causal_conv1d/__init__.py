"""Depthwise causal convolution over time, for packed documents and for decoding."""

import torch
from torch.nn import functional as F

from riverrun.kernels.causal_conv1d.chunked import causal_conv1d_chunked
from riverrun.kernels.causal_conv1d.reference import causal_conv1d_reference
from riverrun.kernels.common.backend import check_shape, resolve_backend


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = activation(bias + Σ_j weight[:, W−1−j] · x_{t−j}), j = 0 … W − 1, never across the start of a sequence.

    Args:
        x: (B, T, D).
        weight: (D, W), the newest tap last.
        bias: (D,), optional.
        activation: None or "silu".
        initial_state: (S, W − 1, D), the inputs before each sequence, oldest first; default: zeros. S is B, or the
            number of documents.
        cu_seqlens: (S + 1,) int32 bounds of documents packed into one row (then B = 1).
        backend: "auto", "reference" or "chunked".

    Returns:
        y: (B, T, D) in the dtype of `x`.
        state: (S, W − 1, D), the last inputs of each sequence, oldest first; of the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit, an unknown activation or backend, or cu_seqlens with B ≠ 1.
    """
    op = "causal_conv1d"
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(f"{op}: expected x (B, T, D), weight (D, W), got {tuple(x.shape)}, {tuple(weight.shape)}")
    (B, T, D), W = x.shape, weight.shape[1]
    check_shape(op, "weight", weight, (D, W), "(D, W)")
    if bias is not None:
        check_shape(op, "bias", bias, (D,), "(D,)")
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu', got {activation!r}")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"{op}: cu_seqlens describes documents packed into one row: expected batch size 1, got {B}")
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = x.new_zeros(S, W - 1, D)
    check_shape(op, "initial_state", initial_state, (S, W - 1, D), "(S, W - 1, D)")
    reference = resolve_backend(op, backend, x, T) == "reference"
    convolve = causal_conv1d_reference if reference else causal_conv1d_chunked
    y, state = convolve(x, weight.to(x.dtype), initial_state.to(x.dtype), cu_seqlens)
    if bias is not None:
        y = y + bias.to(x.dtype)
    return F.silu(y) if activation == "silu" else y, state
