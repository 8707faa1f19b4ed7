"""The gated DeltaProduct recurrence, one Householder step at a time: what the other backends are tested against.

Gated DeltaNet (arXiv 2412.06464) is n = 1, DeltaNet has no gate besides; n > 1 is DeltaProduct (arXiv 2502.10297).
Per head, with state S (K, V), and for each token t:

    S ← exp(g_t) S
    S ← (I - β_tj k_tj k_tjᵀ) S + β_tj k_tj v_tjᵀ      for j = 1 … n
    o_t = scale · Sᵀ q_t
"""

import itertools

import torch

from riverrun.kernels.common.chunks import sequence_bounds


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    """x / ‖x‖ over the last axis; zero stays zero."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def gated_delta_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    qk_l2norm: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.gated_delta.gated_delta` as a loop over tokens, one sequence (or batch of rows) at a time."""
    if cu_seqlens is None:
        return _recurrence(q, k, v, beta, g, scale, qk_l2norm, initial_state)
    bounds = sequence_bounds(q, cu_seqlens).tolist()
    outputs, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows = slice(start, end)
        gate = None if g is None else g[:, rows]
        state = None if initial_state is None else initial_state[i : i + 1]
        o, state = _recurrence(q[:, rows], k[:, rows], v[:, rows], beta[:, rows], gate, scale, qk_l2norm, state)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    qk_l2norm: bool,
    S: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, beta = (t.to(dtype) for t in (q, k, v, beta))
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    (batch, T, n, H, K), V = k.shape, v.shape[-1]
    S = q.new_zeros(batch, H, K, V) if S is None else S.to(dtype)
    outputs = []
    for t in range(T):
        if g is not None:
            S = g[:, t, :, None, None].to(dtype).exp() * S
        for j in range(n):
            key, value = k[:, t, j, :, :, None], v[:, t, j, :, None, :]  # (batch, H, K, 1), (batch, H, 1, V)
            S = S + beta[:, t, j, :, None, None] * key * (value - key.mT @ S)
        outputs.append((scale * q[:, t, :, None, :] @ S).squeeze(-2))
    return torch.stack(outputs, dim=1).to(out_dtype), S
