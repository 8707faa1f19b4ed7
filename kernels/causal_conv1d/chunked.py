"""The convolution of whole sequences as W shifted products.

Every sequence is preceded by its initial state, W − 1 inputs, in one long row; then no tap needs a mask, and a
sequence's final state is the end of its stretch, also if it is shorter than the state.
"""

import torch


def causal_conv1d_chunked(
    x: torch.Tensor, weight: torch.Tensor, initial_state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.causal_conv1d.causal_conv1d` without bias and activation."""
    T, tail = x.shape[1], weight.shape[1] - 1
    if cu_seqlens is None:
        row = torch.cat([initial_state, x], dim=1)  # (B, W - 1 + T, D)
        return _taps(row, weight), row[:, T:]

    bounds, S = cu_seqlens.long(), len(cu_seqlens) - 1
    token = torch.arange(T, device=x.device)
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    place = token + (sequence + 1) * tail  # of every token in the long row
    ends = bounds[1:] + (torch.arange(S, device=x.device) + 1) * tail
    before_end = torch.arange(-tail, 0, device=x.device)
    starts = ends - (bounds[1:] - bounds[:-1])
    row = x.new_zeros(T + S * tail, x.shape[2])
    row = row.index_copy(0, (starts[:, None] + before_end).flatten(), initial_state.flatten(0, 1))
    row = row.index_copy(0, place, x[0])
    y = _taps(row[None], weight)[0]  # output of the row's place p + tail stands at p
    state = row[(ends[:, None] + before_end).flatten()].view(S, tail, -1)
    return y[place - tail][None], state


def _taps(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """row (B, W − 1 + L, D) → (B, L, D)."""
    W = weight.shape[1]
    L = row.shape[1] - W + 1
    y = row[:, :L] * weight[:, 0]
    for w in range(1, W):
        y = torch.addcmul(y, row[:, w : w + L], weight[:, w])
    return y
