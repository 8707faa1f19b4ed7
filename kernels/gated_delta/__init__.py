"""The gated delta rule with n Householder steps a token: DeltaNet, Gated DeltaNet and Gated DeltaProduct in one op."""

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.gated_delta.chunked import gated_delta_chunked, gated_delta_summary
from riverrun.kernels.gated_delta.reference import gated_delta_reference

LARGEST, MOST_STEPS = 256, 64  # head size and Householder steps a token of the Triton kernels

__all__ = ["gated_delta", "gated_delta_backend", "gated_delta_summary"]


def gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    qk_l2norm: bool = False,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    beta_max: float = 2.0,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token S ← exp(g) S, then n times S ← (I - β k kᵀ) S + β k vᵀ; reads o = scale · Sᵀ q after the last.

    Source: Gated DeltaNet (arXiv 2412.06464, eq. 10) with the n steps of DeltaProduct (arXiv 2502.10297, §3).
    Arithmetic is float32 (float64 if `q` is float64), also under autocast; keep torch's float32 matmul precision at
    "highest" if β may exceed 1. The Triton kernels multiply in the inputs' type, and if `beta_max` > 1 what a state is
    made of in three parts of it, as precise as float32: a reflection does not let errors fade. Values are not checked.
    The state stays bounded for keys of at most unit length.

    Args:
        q: (B, T, H, K), queries.
        k: (B, T, n, H, K), the keys of a token's n Householder steps, applied in order.
        v: (B, T, n, H, V), values.
        beta: (B, T, n, H), step sizes in [0, 2]; above 1 the transition has a negative eigenvalue along k.
        g: (B, T, H), log decay ≤ 0, applied once a token before its first step; None for no decay.
        scale: factor on the output; K ** -0.5 if None.
        qk_l2norm: first scale q and k to unit length, x / sqrt(Σ x² + 1e-6), in the precision of the arithmetic.
        initial_state: (S, H, K, V), zeros if None. S is the batch size, or the number of documents.
        cu_seqlens: (S + 1,) integers rising from 0 to T: the bounds of documents packed into a batch of one row.
        beta_max: the largest β there may be. Up to 1 the Triton kernels are faster and round more.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`).
        chunk_size: Householder steps a chunk in the chunked backend, rounded down to whole tokens; changes speed,
            not the result.

    Returns:
        o (B, T, H, V) in the dtype of `q`, and the final state (S, H, K, V) in float32 (float64 if `q` is float64).

    Raises:
        ValueError: an argument of the wrong shape, bad `cu_seqlens`, or a backend that there is not.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"gated_delta: q must have shape (B, T, H, K), all at least 1, got {tuple(q.shape)}")
    B, T, H, K = q.shape
    if k.dim() != 5 or k.shape[2] < 1:
        raise ValueError(f"gated_delta: k must have shape (B, T, n, H, K) with n at least 1, got {tuple(k.shape)}")
    if v.dim() != 5 or v.shape[-1] < 1:
        raise ValueError(f"gated_delta: v must have shape (B, T, n, H, V) with V at least 1, got {tuple(v.shape)}")
    n, V = k.shape[2], v.shape[-1]
    check_shape("gated_delta", "k", k, (B, T, n, H, K), "(B, T, n, H, K)")
    check_shape("gated_delta", "v", v, (B, T, n, H, V), "(B, T, n, H, V)")
    check_shape("gated_delta", "beta", beta, (B, T, n, H), "(B, T, n, H)")
    if g is not None:
        check_shape("gated_delta", "g", g, (B, T, H), "(B, T, H)")
    if initial_state is not None:
        num_sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
        check_shape("gated_delta", "initial_state", initial_state, (num_sequences, H, K, V), "(S, H, K, V)")
    if chunk_size < 1:
        raise ValueError(f"gated_delta: chunk_size must be at least 1, got {chunk_size}")
    scale = K**-0.5 if scale is None else scale
    chosen = gated_delta_backend(q, n, V, backend)
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            return gated_delta_reference(q, k, v, beta, g, scale, qk_l2norm, initial_state, cu_seqlens)
        if chosen == "triton":
            from riverrun.kernels.gated_delta.triton_op import gated_delta_triton

            return gated_delta_triton(q, k, v, beta, g, scale, qk_l2norm, initial_state, cu_seqlens, exact=beta_max > 1)
        return gated_delta_chunked(q, k, v, beta, g, scale, qk_l2norm, initial_state, cu_seqlens, chunk_size)


def gated_delta_backend(q: torch.Tensor, n: int, V: int, backend: str = "auto") -> str:
    """What runs for such a q (B, T, H, K).

    Raises:
        ValueError: see `gated_delta`.
    """
    T, K = q.shape[1], q.shape[3]
    fits = max(K, V) <= LARGEST and n <= MOST_STEPS
    if backend == "triton" and not fits:
        raise ValueError(
            f"gated_delta: the Triton kernels take K and V up to {LARGEST} and n up to {MOST_STEPS}, got K={K}, V={V}, "
            f"n={n}; use backend='chunked'"
        )
    return resolve_backend("gated_delta", backend, q, T, has_triton=fits)
