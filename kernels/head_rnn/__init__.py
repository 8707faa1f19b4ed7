"""RNNs with a dense recurrent matrix within each head: LSTM, sLSTM, GRU and Elman's."""

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.common.shooting import state_dtype
from riverrun.kernels.head_rnn.cells import CELLS
from riverrun.kernels.head_rnn.chunked import head_rnn_chunked
from riverrun.kernels.head_rnn.reference import head_rnn_reference

ON_CHIP = 256  # bytes of a row of a head's recurrent weights up to which those of four gates fit on a multiprocessor


def head_rnn(
    gates: torch.Tensor,
    weight: torch.Tensor,
    cell: str,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A recurrence whose gates see the whole of their head's h: pre-activation_g = u_g + h₋ W_g.

    lstm (Hochreiter & Schmidhuber 1997): c = σ(f) c₋ + σ(i) tanh(z), h = σ(o) tanh(c).
    slstm (xLSTM, Beck et al. 2024, arXiv 2405.04517): exponential input gate with a normaliser n and a stabiliser m,
    ℓ = log σ(f) + m₋, m = max(i, ℓ) (i where n₋ = 0), c = e^{ℓ−m} c₋ + e^{i−m} tanh(z),
    n = max(e^{ℓ−m} n₋ + e^{i−m}, 1), h = σ(o) c / n.
    gru (Cho et al. 2014, in cuDNN's form without its second bias): n = tanh(u_n + σ(r) h₋ W_n), h = n + σ(z) (h₋ − n).
    elman (Elman 1990): h = tanh(z).

    Heads do not mix, and steps cannot be parallelised: time grows with T. Arithmetic is float32 (float64 if `gates` is
    float64), but the products h₋ W take both factors in the dtype of `gates`.

    Args:
        gates: (B, T, G, H, K), the pre-activations u from the input, bias added, in the order i, f, z, o (lstm, slstm),
            r, z, n (gru) or z (elman).
        weight: (G, H, K, K), W_g of each head: row = channel of h₋, column = channel of the gate.
        cell: "lstm", "slstm", "gru" or "elman".
        initial_state: (S, NS, H, K), zeros if None: c, h (lstm), c, n, m, h (slstm) or h. S is the batch size, or the
            number of documents.
        cu_seqlens: (S + 1,) integers rising strictly from 0 to T: the bounds of documents packed into a batch of one
            row.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`). The Triton kernels keep the
            weights on the chip and take heads of up to 128 channels (64 in float32); wider ones take a batched matrix
            product a step ("chunked", after the other ops' backend of that place).

    Returns:
        h (B, T, H, K) in the dtype of `gates`, and the final state (S, NS, H, K) in float32 (float64 if `gates` is
        float64).

    Raises:
        ValueError: an unknown cell, an argument of the wrong shape, bad `cu_seqlens`, a backend that there is not, or
            heads that are too wide for the one that was asked for.
    """
    op = "head_rnn"
    if cell not in CELLS:
        raise ValueError(f"{op}: unknown cell {cell!r}; choose one of {', '.join(CELLS)}")
    G, NS = len(CELLS[cell].gates), len(CELLS[cell].states)
    if gates.dim() != 5 or gates.shape[2] != G or 0 in gates.shape:
        raise ValueError(
            f"{op}: gates of {cell} must have shape (B, T, {G}, H, K), all at least 1, got {tuple(gates.shape)}"
        )
    B, T, _, H, K = gates.shape
    check_shape(op, "weight", weight, (G, H, K, K), "(G, H, K, K)")
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, (S, NS, H, K), "(S, NS, H, K)")
        initial_state = initial_state.to(state_dtype(gates))
    fits = K * gates.element_size() <= ON_CHIP
    if backend == "triton" and not fits:
        raise ValueError(
            f"{op}: the Triton kernels take heads of up to {ON_CHIP // gates.element_size()} channels of "
            f"{gates.dtype}, got {K}; use more heads, or backend='chunked'"
        )
    chosen = resolve_backend(op, backend, gates, T, has_triton=fits)
    if chosen == "triton":
        from riverrun.kernels.head_rnn.triton_op import head_rnn_triton

        return head_rnn_triton(gates, weight, cell, initial_state, cu_seqlens)
    if initial_state is None:
        initial_state = gates.new_zeros(S, NS, H, K, dtype=state_dtype(gates))
    if chosen == "reference":
        return head_rnn_reference(gates, weight, CELLS[cell], initial_state, cu_seqlens)
    return head_rnn_chunked(gates, weight, cell, initial_state, cu_seqlens)
