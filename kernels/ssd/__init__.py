"""The state space dual (SSD) recurrence of Mamba-2: a linear recurrence with one scalar decay a head and token."""

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.ssd.chunked import ssd_chunked, ssd_summary
from riverrun.kernels.ssd.reference import ssd_reference
from riverrun.kernels.ssd.steps import step_sizes

__all__ = ["ssd", "ssd_backend", "ssd_summary"]

LARGEST_P, LARGEST_N = 128, 256  # of the Triton kernels


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ,  y_t = h_t C_t + D x_t  (Mamba-2, arXiv 2405.21060).

    The step sizes are Δ = dt + dt_bias, or softplus of that. The raw output of a projection, in its own type, with the
    bias and the softplus left to the op, is what the Triton kernels read fastest.

    Arithmetic is float32 (float64 if `x` is float64), also under autocast; the Triton kernels multiply in the type of
    `x` and sum in float32. Values are not checked.

    Args:
        x: (B, T, H, P), the input of H heads of P channels.
        dt: (B, T, H), such that Δ > 0; of any floating type.
        A: (H,), decay rates < 0.
        B: (B, T, G, N), input projections; each of the G groups is shared by H / G consecutive heads.
        C: (B, T, G, N), output projections.
        D: (H,) or (H, P), the skip connection; None for none.
        dt_bias: (H,), added to dt; None for none.
        dt_softplus: Δ is the softplus of that.
        initial_state: (S, H, P, N), zeros if None. S is the batch size, or the number of documents.
        cu_seqlens: (S + 1,) integers rising from 0 to T: the bounds of documents packed into a batch of one row.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`).
        chunk_size: tokens a chunk in the chunked backend; changes speed, not the result.

    Returns:
        y (B, T, H, P) in the dtype of `x`, and the final state (S, H, P, N) in float32 (float64 if `x` is float64).

    Raises:
        ValueError: an argument of the wrong shape, bad `cu_seqlens`, or a backend that there is not.
    """
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"ssd: x must have shape (B, T, H, P), all at least 1, got {tuple(x.shape)}")
    batch, T, H, P = x.shape
    if B.dim() != 4 or 0 in B.shape or H % B.shape[2]:
        raise ValueError(f"ssd: B must have shape (B, T, G, N) with G a divisor of H = {H}, got {tuple(B.shape)}")
    G, N = B.shape[2:]
    check_shape("ssd", "dt", dt, (batch, T, H), "(B, T, H)")
    check_shape("ssd", "A", A, (H,), "(H,)")
    check_shape("ssd", "B", B, (batch, T, G, N), "(B, T, G, N)")
    check_shape("ssd", "C", C, (batch, T, G, N), "(B, T, G, N)")
    if dt_bias is not None:
        check_shape("ssd", "dt_bias", dt_bias, (H,), "(H,)")
    if D is not None and (D.dim() not in (1, 2) or D.shape != (H, P)[: D.dim()]):
        raise ValueError(f"ssd: D must have shape (H,) = {(H,)} or (H, P) = {(H, P)}, got {tuple(D.shape)}")
    if initial_state is not None:
        num_sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        check_shape("ssd", "initial_state", initial_state, (num_sequences, H, P, N), "(S, H, P, N)")
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size must be at least 1, got {chunk_size}")
    chosen = ssd_backend(x, N, backend)
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "triton":
            from riverrun.kernels.ssd.triton_op import ssd_triton

            return ssd_triton(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, cu_seqlens)
        steps = step_sizes(x, dt, dt_bias, dt_softplus)
        if chosen == "reference":
            return ssd_reference(x, steps, A, B, C, D, initial_state, cu_seqlens)
        return ssd_chunked(x, steps, A, B, C, D, initial_state, cu_seqlens, chunk_size)


def ssd_backend(x: torch.Tensor, N: int, backend: str = "auto") -> str:
    """What runs for such an x (B, T, H, P).

    Raises:
        ValueError: see `ssd`.
    """
    T, P = x.shape[1], x.shape[3]
    fits = P <= LARGEST_P and N <= LARGEST_N
    if backend == "triton" and not fits:
        raise ValueError(
            f"ssd: the Triton kernels take P up to {LARGEST_P} and N up to {LARGEST_N}, got P={P}, N={N}; use "
            "backend='chunked'"
        )
    return resolve_backend("ssd", backend, x, T, has_triton=fits)
