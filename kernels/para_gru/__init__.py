"""ParaGRU: a GRU whose recurrent weights are diagonal, so that it can be solved in parallel over time."""

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.common.shooting import final_state, plan, state_dtype
from riverrun.kernels.para_gru.chunked import para_gru_chunked
from riverrun.kernels.para_gru.reference import para_gru_reference


def para_gru(
    gates: torch.Tensor,
    weight: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    tolerance: float = 1e-5,
    max_passes: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = σ(a_z h₋ + u_z), r = σ(a_r h₋ + u_r), n = tanh(a_n r h₋ + u_n), h = (1 − z) h₋ + z n, channel by channel.

    ParaRNN (Danieli et al. 2025, arXiv 2510.21450). Arithmetic is float32 (float64 if `gates` is float64). The
    gradient is exact at the trajectory that the forward pass found.
    `riverrun.kernels.common.shooting.take_statistics` tells how the solves went.

    Args:
        gates: (B, T, 3, D), the pre-activations u_z, u_r, u_n, bias already added.
        weight: (3, D), a_z, a_r, a_n.
        initial_state: (S, D), zeros if None. S is the batch size, or the number of documents.
        cu_seqlens: (S + 1,) integers rising strictly from 0 to T: the bounds of documents packed into a batch of one
            row.
        backend: "auto", "reference" or "chunked" (see `resolve_backend`).
        chunk_size: tokens a chunk in the chunked backend; default: by measurement, which may be to step through time.
        tolerance: how much the last pass may change a state for the solve to have converged.
        max_passes: after so many, a solve that has not converged is finished step by step, with a RuntimeWarning.

    Returns:
        h (B, T, D) in the dtype of `gates`, and the final state (S, D) in float32 (float64 if `gates` is float64).

    Raises:
        ValueError: an argument of the wrong shape, bad `cu_seqlens`, a chunk size or number of passes below 1, a
            tolerance that is not positive, or a backend that there is not.
    """
    op = "para_gru"
    if gates.dim() != 4 or gates.shape[2] != 3 or 0 in gates.shape:
        raise ValueError(f"{op}: gates must have shape (B, T, 3, D), all at least 1, got {tuple(gates.shape)}")
    B, T, _, D = gates.shape
    check_shape(op, "weight", weight, (3, D), "(3, D)")
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = gates.new_zeros(S, D, dtype=state_dtype(gates))
    check_shape(op, "initial_state", initial_state, (S, D), "(S, D)")
    chunk_size, max_passes = plan(op, gates, cu_seqlens, chunk_size, tolerance, max_passes)
    initial_state = initial_state.to(state_dtype(gates))
    if resolve_backend(op, backend, gates, T) == "reference":
        return para_gru_reference(gates, weight, initial_state, cu_seqlens)
    states = para_gru_chunked(gates, weight, initial_state[:, None], cu_seqlens, chunk_size, tolerance, max_passes)
    (h,) = states.unbind(0)
    return h.to(gates.dtype), final_state(states, cu_seqlens)[:, 0]
