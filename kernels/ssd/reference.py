"""The state space dual recurrence, one token at a time: the definition that every other backend is tested against.

Mamba-2 (arXiv 2405.21060). Per head, with state h (P, N), input x (P,), step size dt > 0 and decay rate A < 0:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ
    y_t = h_t C_t + D x_t
"""

import itertools

import torch

from riverrun.kernels.common.chunks import sequence_bounds


def ssd_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.ssd.ssd` as a loop over tokens, one sequence (or batch of rows) after the other."""
    if cu_seqlens is None:
        return _recurrence(x, dt, A, B, C, D, initial_state)
    bounds = sequence_bounds(x, cu_seqlens).tolist()
    ys, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        h = None if initial_state is None else initial_state[i : i + 1]
        y, h = _recurrence(x[:, start:end], dt[:, start:end], A, B[:, start:end], C[:, start:end], D, h)
        ys.append(y)
        states.append(h)
    return torch.cat(ys, dim=1), torch.cat(states)


def _recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    h: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    out_dtype, x, dt, A = x.dtype, x.to(dtype), dt.to(dtype), A.to(dtype)
    B, C = (t.to(dtype).repeat_interleave(H // G, dim=2) for t in (B, C))  # a group's heads share B and C
    h = x.new_zeros(batch, H, P, N) if h is None else h.to(dtype)
    ys = []
    for t in range(T):
        decay = (dt[:, t] * A).exp()
        dtx = dt[:, t, :, None] * x[:, t]
        h = decay[:, :, None, None] * h + dtx[..., :, None] * B[:, t, :, None, :]  # (batch, H, P, N)
        ys.append((h @ C[:, t, :, :, None]).squeeze(-1))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D.to(dtype).view(H, -1) * x
    return y.to(out_dtype), h
