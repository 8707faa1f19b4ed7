"""Depthwise causal convolution over time, for packed documents and for decoding."""

import torch
from torch.nn import functional as F

from riverrun.kernels.causal_conv1d.chunked import causal_conv1d_chunked
from riverrun.kernels.causal_conv1d.reference import causal_conv1d_reference, to_unit
from riverrun.kernels.common.backend import check_shape, resolve_backend

# the Triton kernels keep W inputs, W pending gradients and W sums in registers
TRITON_TAPS = 8
TRITON_UNIT = 1024  # channels of a vector of unit length: a program has all of them


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    unit: int | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = activation(bias + Σ_j weight[:, W−1−j] · x_{t−j}), j = 0 … W − 1, never across the start of a sequence.

    Arithmetic is float32 (float64 if `x` is float64). Channels do not mix.

    Args:
        x: (B, T, D).
        weight: (D, W), the newest tap last.
        bias: (D,), optional.
        activation: None or "silu".
        unit: scale what the activation makes of every `unit` neighbouring channels (a head's) to unit length,
            y / √(Σ y² + 1e-6), as queries and keys of delta rules are. `unit` divides D. None: leave it as it is.
        initial_state: (S, W − 1, D), the inputs before each sequence, oldest first; zeros if None. S is the batch
            size, or the number of documents.
        cu_seqlens: (S + 1,) integers rising strictly from 0 to T: the bounds of documents packed into a batch of one
            row.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`). The Triton kernels are for W up to
            8 and units of up to 1,024 channels, read `x` in place if its tokens are evenly spaced, and take the values
            of `cu_seqlens` on trust, so that the host need not wait for them.

    Returns:
        y (B, T, D), and the final state (S, W − 1, D): the last inputs of each sequence, oldest first, reaching back
        into the initial state where a sequence is shorter. Both in the dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape, bad `cu_seqlens`, an unknown activation, a `unit` that does not
            divide D, or a backend that there is not.
    """
    op = "causal_conv1d"
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"{op}: x must have shape (B, T, D), all at least 1, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(f"{op}: weight must have shape (D, W) with W at least 1, got {tuple(weight.shape)}")
    (B, T, D), W = x.shape, weight.shape[1]
    check_shape(op, "weight", weight, (D, W), "(D, W)")
    if bias is not None:
        check_shape(op, "bias", bias, (D,), "(D,)")
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu', got {activation!r}")
    if unit is not None and (unit < 1 or D % unit):
        raise ValueError(f"{op}: unit={unit} must divide the {D} channels, or be None for no unit length")
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, (S, W - 1, D), "(S, W - 1, D)")
        initial_state = initial_state.to(x.dtype)
    if backend == "triton" and W > TRITON_TAPS:
        raise ValueError(f"{op}: the Triton kernel is for up to {TRITON_TAPS} taps, got {W}; use backend='chunked'")
    if backend == "triton" and unit is not None and unit > TRITON_UNIT:
        raise ValueError(
            f"{op}: the Triton kernel is for units of up to {TRITON_UNIT} channels, got {unit}; use backend='chunked'"
        )
    fits = W <= TRITON_TAPS and (unit is None or unit <= TRITON_UNIT)
    chosen = resolve_backend(op, backend, x, T, has_triton=fits)
    if chosen == "triton":
        from riverrun.kernels.causal_conv1d.triton_op import causal_conv1d_triton

        return causal_conv1d_triton(x, weight, bias, activation == "silu", initial_state, cu_seqlens, unit)
    if initial_state is None:
        initial_state = x.new_zeros(S, W - 1, D)
    if chosen == "reference":
        y, state = causal_conv1d_reference(x, weight, bias, initial_state, cu_seqlens)
        y = F.silu(y) if activation == "silu" else y
        return (y if unit is None else to_unit(y, unit)).to(x.dtype), state
    return causal_conv1d_chunked(x, weight, bias, activation == "silu", initial_state, cu_seqlens, unit)
