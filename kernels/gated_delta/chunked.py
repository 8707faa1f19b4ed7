"""The gated DeltaProduct recurrence in chunks: matrix products over all chunks at once, a short scan between.

The WY form of a product of Householder matrices (DeltaNet, arXiv 2406.06484, §3; gates as in arXiv 2412.06464, §3.3),
with chunks aligned to tokens. A chunk holds Q tokens, so C = Q n sub-steps. Indices i, j run over sub-steps, t over
tokens; G is the log decay summed from the start of the chunk, γ = exp(G), and S the state (K, V) at the chunk's start.

    A_ij = β_i exp(G_i - G_j) ⟨k_i, k_j⟩ for j < i                              T = (I + A)⁻¹
    P_tj = exp(G_t - G_j) ⟨q_t, k_j⟩ for j up to the last sub-step of token t   k̃_j = exp(G_C - G_j) k_j

    V̂  = T (βV - βγK S)        the values as corrected by all earlier sub-steps (U - W S in the paper)
    S' = γ_C S + K̃ᵀ V̂          the state at the end of the chunk
    O  = γQ S + P V̂

Only the two lines for V̂ and S' are a loop over chunks.

T is found by forward substitution in full precision: with β up to 2 and repeated keys the powers of A grow beyond
float32, although no entry of T exceeds 2 for unit keys, so a Neumann series or low precision would not do.
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
    (num_tokens, n, H, K), V = k.shape[1:], v.shape[-1]
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    chunks = chunk_layout(q, min(max(chunk_size // n, 1), num_tokens), cu_seqlens)
    M, Q = chunks.index.shape
    C = Q * n

    q = chunks.split(q).to(dtype).transpose(1, 2)  # (M, H, Q, K)
    k, v = (chunks.split(t).to(dtype).flatten(1, 2).transpose(1, 2) for t in (k, v))  # (M, H, C, K), (M, H, C, V)
    beta = chunks.split(beta).to(dtype).flatten(1, 2).mT[..., None]  # (M, H, C, 1)
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    q, k, bk, bv = (q * scale).contiguous(), k.contiguous(), (beta * k).contiguous(), (beta * v).contiguous()

    if g is None:
        from_start = to_end = decay = q.new_ones(M, 1, 1, 1)
        between = torch.ones(Q, Q, dtype=dtype, device=q.device).tril()
    else:
        G = chunks.split(g).to(dtype).cumsum(1).mT  # (M, H, Q); the gate enters at a token's first sub-step
        later = torch.ones(Q, Q, dtype=torch.bool, device=q.device).triu(1)
        between = (G[..., :, None] - G[..., None, :]).masked_fill(later, -torch.inf).exp()
        from_start, to_end = G.exp()[..., None], (G[..., -1:] - G).exp()[..., None]  # (M, H, Q, 1)
        decay = from_start[:, :, -1:]

    # only the strict lower triangle of A is read by the solve
    A = ((bk @ k.mT).view(M, H, Q, n, Q, n) * between[..., :, None, :, None]).view(M, H, C, C)
    eye = torch.eye(C, dtype=dtype, device=q.device)
    T = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    erase = bk * _per_sub_step(-from_start, n)
    write = k * _per_sub_step(to_end, n)
    corrected = []

    def step(S, T, erase, bv, write, decay):
        corrected.append(T @ (bv + erase @ S))
        return decay * S + write.mT @ corrected[-1]

    num_sequences = len(chunks.order)
    state = q.new_zeros(num_sequences, H, K, V) if initial_state is None else initial_state.to(dtype)
    starts, final_state = chunks.scan(step, state, T, erase, bv, write, decay)

    P = ((q @ k.mT).view(M, H, Q, Q, n) * between[..., None]).view(M, H, Q, C)
    o = (q * from_start) @ starts + P @ torch.cat(corrected)
    return chunks.join(o.transpose(1, 2)).to(out_dtype), final_state


def _per_sub_step(x: torch.Tensor, n: int) -> torch.Tensor:
    """(…, Q, 1) per token → (…, Q·n, 1) per sub-step."""
    return x if x.shape[-2] == 1 or n == 1 else x.repeat_interleave(n, dim=-2)
