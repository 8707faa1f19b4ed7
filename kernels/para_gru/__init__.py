"""ParaGRU: a GRU whose recurrent weights are diagonal, so that it can be solved in parallel over time."""

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.common.shooting import check_solver, final_state, plan, state_dtype
from riverrun.kernels.common.slope import linearise
from riverrun.kernels.para_gru.chunked import para_gru_chunked
from riverrun.kernels.para_gru.reference import para_gru_reference


def para_gru(
    gates: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
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
        gates: (B, T, 3, D), the pre-activations u_z, u_r, u_n.
        weight: (3, D), a_z, a_r, a_n.
        bias: (3, D), added to the gates; the Triton kernel does it for nothing.
        initial_state: (S, D), zeros if None. S is the batch size, or the number of documents.
        cu_seqlens: (S + 1,) integers rising strictly from 0 to T: the bounds of documents packed into a batch of one
            row.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`).
        chunk_size: tokens a chunk, at least (the Triton kernel rounds up, and takes a power of two of chunks); T steps
            through time. Default: by measurement, as few chunks as fill the device.
        tolerance: how much the last pass may change a state for the solve to have converged.
        max_passes: after so many, a solve that has not converged is finished step by step, which is exact but slow.

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
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, (S, D), "(S, D)")
    check_solver(op, chunk_size, tolerance, max_passes)
    if bias is not None:
        check_shape(op, "bias", bias, (3, D), "(3, D)")
    chosen = resolve_backend(op, backend, gates, T, has_triton=True)
    if chosen == "triton":
        from riverrun.kernels.para_gru.triton_cell import para_gru_triton

        initial = None if initial_state is None else initial_state.float()[:, None]
        h, final = para_gru_triton(gates, weight, bias, initial, cu_seqlens, chunk_size, tolerance, max_passes)
        return h, final.squeeze(1)
    if initial_state is None:
        initial_state = gates.new_zeros(S, D, dtype=state_dtype(gates))
    initial_state = initial_state.to(state_dtype(gates))
    if bias is not None:
        gates = (gates + bias).to(gates.dtype)
    if chosen == "reference":
        return para_gru_reference(gates, weight, initial_state, cu_seqlens)
    chunk_size, max_passes = plan(gates, cu_seqlens, chunk_size, max_passes)
    states = para_gru_chunked(gates, weight, initial_state[:, None], cu_seqlens, chunk_size, tolerance, max_passes)
    (h,) = states.unbind(0)
    return h.to(gates.dtype), final_state(states, cu_seqlens)[:, 0]


def para_gru_slope(
    gates: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """How the final state depends on the initial one, at an initial state of zeros, without a gradient.

    For short sequences: in Triton a step at a time.

    Args:
        gates, weight, bias, cu_seqlens, backend: as in `para_gru`.

    Returns:
        ∂(final state)/∂(initial state) (S, 1, 1, D), in float32 (float64 if `gates` is float64).

    Raises:
        ValueError: a backend that there is not, or that does not take such gates; shapes are for `para_gru` to check.
    """
    if resolve_backend("para_gru", backend, gates, gates.shape[1], has_triton=True) == "triton":
        from riverrun.kernels.para_gru.triton_cell import para_gru_slope_triton

        return para_gru_slope_triton(gates, weight, bias, cu_seqlens)
    S, gates, weight = gates.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, gates.detach(), weight.detach()

    def solve(start: torch.Tensor) -> torch.Tensor:
        _, final = para_gru(
            gates, weight, bias=bias, initial_state=start[:, 0], cu_seqlens=cu_seqlens, backend=backend
        )  # fmt: skip
        return final[:, None]

    return linearise(solve, gates.new_zeros(S, 1, gates.shape[-1], dtype=state_dtype(gates)))[1]
