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

from riverrun.kernels.common.chunks import Chunks, chunk_layout
from riverrun.kernels.gated_delta.reference import l2_normalise


class _Walk:
    """What carries the state over the chunks: T, and what each chunk erases from the state, writes to it and keeps."""

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        g: torch.Tensor | None,
        qk_l2norm: bool,
        chunks: Chunks,
        dtype: torch.dtype,
    ):
        n = k.shape[2]
        M, Q = chunks.index.shape
        C = Q * n
        k, v = (chunks.split(t).to(dtype).flatten(1, 2).transpose(1, 2) for t in (k, v))  # (M, H, C, K), (M, H, C, V)
        beta = chunks.split(beta).to(dtype).flatten(1, 2).mT[..., None]  # (M, H, C, 1)
        k = (l2_normalise(k) if qk_l2norm else k).contiguous()
        bk, self.bv = (beta * k).contiguous(), (beta * v).contiguous()
        if g is None:
            self.from_start = to_end = self.decay = k.new_ones(M, 1, 1, 1)
            self.between = torch.ones(Q, Q, dtype=dtype, device=k.device).tril()
        else:
            G = chunks.split(g).to(dtype).cumsum(1).mT  # (M, H, Q); the gate enters at a token's first sub-step
            later = torch.ones(Q, Q, dtype=torch.bool, device=k.device).triu(1)
            self.between = (G[..., :, None] - G[..., None, :]).masked_fill(later, -torch.inf).exp()
            self.from_start, to_end = G.exp()[..., None], (G[..., -1:] - G).exp()[..., None]  # (M, H, Q, 1)
            self.decay = self.from_start[:, :, -1:]

        # only the strict lower triangle of A is read by the solve
        A = ((bk @ k.mT).view(M, -1, Q, n, Q, n) * self.between[..., :, None, :, None]).view(M, -1, C, C)
        eye = torch.eye(C, dtype=dtype, device=k.device)
        self.T = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        self.k, self.erase, self.write = k, bk * _per_sub_step(-self.from_start, n), k * _per_sub_step(to_end, n)
        self.chunks = chunks

    def scan(self, state: torch.Tensor, bv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The states at the start of each chunk, those at the end of each sequence, and the corrected values."""
        corrected = []

        def step(S, T, erase, bv, write, decay):
            corrected.append(T @ (bv + erase @ S))
            return decay * S + write.mT @ corrected[-1]

        starts, final = self.chunks.scan(step, state, self.T, self.erase, bv, self.write, self.decay)
        return starts, final, torch.cat(corrected)


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
    q = chunks.split(q).to(dtype).transpose(1, 2)  # (M, H, Q, K)
    q = ((l2_normalise(q) if qk_l2norm else q) * scale).contiguous()
    walk = _Walk(k, v, beta, g, qk_l2norm, chunks, dtype)
    state = q.new_zeros(len(chunks.order), H, K, V) if initial_state is None else initial_state.to(dtype)
    starts, final_state, corrected = walk.scan(state, walk.bv)
    P = ((q @ walk.k.mT).view(M, H, Q, Q, n) * walk.between[..., None]).view(M, H, Q, Q * n)
    o = (q * walk.from_start) @ starts + P @ corrected
    return chunks.join(o.transpose(1, 2)).to(out_dtype), final_state


def gated_delta_summary(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    qk_l2norm: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    with_transfer: bool = True,
    chunk_size: int = 64,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What whole sequences do to a state, without any outputs: final state = M · initial state + E.

    M is the product of the sequence's transitions exp(g) (I − β k kᵀ), and E its final state from zeros. Both come from
    one scan over the chunks: M is the state that starts as the identity and to which nothing is written.

    Args:
        k, v, beta, g, qk_l2norm, cu_seqlens, chunk_size: as of `gated_delta`.
        with_transfer: compute M, which costs as much again where V = K.

    Returns:
        M (S, H, K, K), or None, and E (S, H, K, V), in float32 (float64 if `k` is float64).
    """
    (num_tokens, n, H, K), V = k.shape[1:], v.shape[-1]
    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        chunks = chunk_layout(k, min(max(chunk_size // n, 1), num_tokens), cu_seqlens)
        walk = _Walk(k, v, beta, g, qk_l2norm, chunks, dtype)
        columns = K if with_transfer else 0
        identity = torch.eye(K, dtype=dtype, device=k.device)[:, :columns].expand(len(chunks.order), H, K, columns)
        state = torch.cat([identity, identity.new_zeros(len(chunks.order), H, K, V)], dim=-1)
        nothing = walk.bv.new_zeros(*walk.bv.shape[:-1], columns)
        _, final, _ = walk.scan(state, torch.cat([nothing, walk.bv], dim=-1))
    return final[..., :columns] if with_transfer else None, final[..., columns:]


def _per_sub_step(x: torch.Tensor, n: int) -> torch.Tensor:
    """(…, Q, 1) per token → (…, Q·n, 1) per sub-step."""
    return x if x.shape[-2] == 1 or n == 1 else x.repeat_interleave(n, dim=-2)
