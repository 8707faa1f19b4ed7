"""ParaLSTM: an LSTM with coupled gates, peepholes and diagonal recurrent weights, solved in parallel over time."""

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.common.shooting import check_solver, final_state, plan, state_dtype
from riverrun.kernels.common.slope import linearise
from riverrun.kernels.para_lstm.chunked import para_lstm_chunked
from riverrun.kernels.para_lstm.reference import para_lstm_reference


def para_lstm(
    gates: torch.Tensor,
    weight: torch.Tensor,
    peephole: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    tolerance: float = 1e-5,
    max_passes: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """f = σ(a_f h₋ + c_f c₋ + u_f), c = f c₋ + (1 − f) tanh(a_c h₋ + u_c), o = σ(a_o h₋ + c_o c + u_o), h = o tanh(c).

    Channel by channel; the output gate sees the new c. ParaRNN (Danieli et al. 2025, arXiv 2510.21450). Arithmetic is
    float32 (float64 if `gates` is float64). The gradient is exact at the trajectory that the forward pass found.
    `riverrun.kernels.common.shooting.take_statistics` tells how the solves went.

    Args:
        gates: (B, T, 3, D), the pre-activations u_f, u_o, u_c.
        weight: (3, D), a_f, a_o, a_c.
        peephole: (2, D), c_f, c_o.
        bias: (3, D), added to the gates; the Triton kernel does it for nothing.
        initial_state: (S, 2, D), c and h; zeros if None. S is the batch size, or the number of documents.
        cu_seqlens: (S + 1,) integers rising strictly from 0 to T: the bounds of documents packed into a batch of one
            row.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`).
        chunk_size: tokens a chunk, at least (the Triton kernel rounds up, and takes a power of two of chunks); T steps
            through time. Default: by measurement, as few chunks as fill the device.
        tolerance: how much the last pass may change a state for the solve to have converged.
        max_passes: after so many, a solve that has not converged is finished step by step, which is exact but slow.

    Returns:
        h (B, T, D) in the dtype of `gates`, and the final state (S, 2, D), c and h, in float32 (float64 if `gates` is
        float64).

    Raises:
        ValueError: an argument of the wrong shape, bad `cu_seqlens`, a chunk size or number of passes below 1, a
            tolerance that is not positive, or a backend that there is not.
    """
    op = "para_lstm"
    if gates.dim() != 4 or gates.shape[2] != 3 or 0 in gates.shape:
        raise ValueError(f"{op}: gates must have shape (B, T, 3, D), all at least 1, got {tuple(gates.shape)}")
    B, T, _, D = gates.shape
    check_shape(op, "weight", weight, (3, D), "(3, D)")
    check_shape(op, "peephole", peephole, (2, D), "(2, D)")
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, (S, 2, D), "(S, 2, D)")
    check_solver(op, chunk_size, tolerance, max_passes)
    if bias is not None:
        check_shape(op, "bias", bias, (3, D), "(3, D)")
    chosen = resolve_backend(op, backend, gates, T, has_triton=True)
    weights = torch.cat([weight, peephole.to(weight.dtype)])
    if chosen == "triton":
        from riverrun.kernels.para_lstm.triton_cell import para_lstm_triton

        initial = None if initial_state is None else initial_state.float()
        return para_lstm_triton(gates, weights, bias, initial, cu_seqlens, chunk_size, tolerance, max_passes)
    if initial_state is None:
        initial_state = gates.new_zeros(S, 2, D, dtype=state_dtype(gates))
    initial_state = initial_state.to(state_dtype(gates))
    if bias is not None:
        gates = (gates + bias).to(gates.dtype)
    if chosen == "reference":
        return para_lstm_reference(gates, weight, peephole, initial_state, cu_seqlens)
    chunk_size, max_passes = plan(gates, cu_seqlens, chunk_size, max_passes)
    states = para_lstm_chunked(gates, weights, initial_state, cu_seqlens, chunk_size, tolerance, max_passes)
    _, h = states.unbind(0)
    return h.to(gates.dtype), final_state(states, cu_seqlens)


def para_lstm_slope(
    gates: torch.Tensor,
    weight: torch.Tensor,
    peephole: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """How the final state depends on the initial one, at an initial state of zeros, without a gradient.

    For short sequences: in Triton a step at a time.

    Args:
        gates, weight, peephole, bias, cu_seqlens, backend: as in `para_lstm`.

    Returns:
        ∂(final state)/∂(initial state) (S, 2, 2, D), in float32 (float64 if `gates` is float64).

    Raises:
        ValueError: a backend that there is not, or that does not take such gates; shapes are for `para_lstm` to check.
    """
    if resolve_backend("para_lstm", backend, gates, gates.shape[1], has_triton=True) == "triton":
        from riverrun.kernels.para_lstm.triton_cell import para_lstm_slope_triton

        return para_lstm_slope_triton(gates, torch.cat([weight, peephole.to(weight.dtype)]), bias, cu_seqlens)
    S, gates, weight = gates.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, gates.detach(), weight.detach()

    def solve(start: torch.Tensor) -> torch.Tensor:
        return para_lstm(
            gates, weight, peephole, bias=bias, initial_state=start, cu_seqlens=cu_seqlens, backend=backend
        )[1]  # fmt: skip

    return linearise(solve, gates.new_zeros(S, 2, gates.shape[-1], dtype=state_dtype(gates)))[1]
