"""The gated DeltaProduct recurrence in chunks: matrix products over all chunks at once, a short scan between.

The WY form of a product of Householder matrices (DeltaNet, arXiv 2406.06484, §3; gates as in arXiv 2412.06464, §3.3),
with chunks aligned to tokens. A chunk holds Q tokens, so C = Q n sub-steps. Indices i, j run over sub-steps, t over
tokens; G is the log decay summed from the start of the chunk, γ = exp(G), and S the state (K, V) at the chunk's start.

    A_ij = β_i exp(G_i - G_j) ⟨k_i, k_j⟩ for j < i                  T = (I + A)⁻¹
    P_tj = exp(G_t - G_j) ⟨q_t, k_j⟩ for j up to the last sub-step of token t
    k̃_j  = exp(G_C - G_j) k_j

With W = T (βγK) and U = T (βV), the corrected values of the chunk are U - W S, so outputs and next state are both affine
in S, and no chunk needs its neighbour until S is known:

    O  = (γQ - P W) S + P U
    S' = (γ_C I - K̃ᵀ W) S + K̃ᵀ U

The triangular system is solved by forward substitution in full precision: with β up to 2 and repeated keys the powers
of A grow beyond float32, although its inverse stays below 2, so a Neumann series or low precision would not do.
Every exponent is a difference ≤ 0.
"""

import torch

from riverrun.kernels.common.chunks import chunk_layout
from riverrun.kernels.gated_delta.reference import l2_normalise


def gated_delta_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    qk_l2norm: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.gated_delta.gated_delta` in chunks of about `chunk_size` sub-steps.

    Padding has β = 0 and g = 0: it leaves the state alone.
    """
    (T, n, H, K), V = k.shape[1:], v.shape[-1]
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    chunks = chunk_layout(q, min(max(chunk_size // n, 1), T), cu_seqlens)
    M, Q = chunks.index.shape
    C = Q * n

    q = chunks.split(q).to(dtype).transpose(1, 2)  # (M, H, Q, K)
    k, v = (chunks.split(t).to(dtype).flatten(1, 2).transpose(1, 2) for t in (k, v))  # (M, H, C, K), (M, H, C, V)
    beta = chunks.split(beta).to(dtype).flatten(1, 2).mT[..., None]  # (M, H, C, 1)
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    q, k, bk, bv = (q * scale).contiguous(), k.contiguous(), (beta * k).contiguous(), (beta * v).contiguous()

    if g is None:
        from_start = to_end = decay = q.new_ones(1, 1, 1, 1)
        between = torch.ones(Q, Q, dtype=dtype, device=q.device).tril()
    else:
        G = chunks.split(g).to(dtype).cumsum(1).mT  # (M, H, Q); the gate enters at a token's first sub-step
        later = torch.ones(Q, Q, dtype=torch.bool, device=q.device).triu(1)
        between = (G[..., :, None] - G[..., None, :]).masked_fill(later, -torch.inf).exp()
        from_start, to_end = G.exp()[..., None], (G[..., -1:] - G).exp()[..., None]  # (M, H, Q, 1)
        decay = from_start[:, :, -1:]

    # only the strict lower triangle of A is read by the solve
    A = ((bk @ k.mT).view(M, H, Q, n, Q, n) * between[..., :, None, :, None]).view(M, H, C, C)
    T_inv = torch.linalg.solve_triangular(A, torch.eye(C, dtype=dtype, device=q.device), upper=False, unitriangular=True)
    P = ((q @ k.mT).view(M, H, Q, Q, n) * between[..., None]).view(M, H, Q, C)
    PT, KT = P @ T_inv, (k * _per_sub_step(to_end, n)).mT @ T_inv  # (M, H, Q, C), (M, H, K, C)
    minus_bk = bk * _per_sub_step(-from_start, n)

    num_sequences = len(chunks.order)
    state = q.new_zeros(num_sequences, H, K, V) if initial_state is None else initial_state.to(dtype)
    transition = decay * torch.eye(K, dtype=dtype, device=q.device) + KT @ minus_bk
    starts, final_state = chunks.scan(lambda S, F, U: U + F @ S, state, transition, KT @ bv)
    o = PT @ bv + (q * from_start + PT @ minus_bk) @ starts
    return chunks.join(o.transpose(1, 2)).to(out_dtype), final_state


def _per_sub_step(x: torch.Tensor, n: int) -> torch.Tensor:
    """(…, Q, 1) per token → (…, Q·n, 1) per sub-step."""
    return x if x.shape[-2] == 1 or n == 1 else x.repeat_interleave(n, dim=-2)
