"""The state space dual recurrence in chunks of Q tokens: matrix products over all chunks at once, a short scan between.

Mamba-2 (arXiv 2405.21060, §6). With a_i = Σ_{j≤i} dt_j A inside a chunk and H the state (P, N) at its start:

    Y  = (L ⊙ C Bᵀ) (dt ⊙ X) + diag(eᵃ) C Hᵀ + D X        L_ij = exp(a_i - a_j) for j ≤ i, else 0
    H' = exp(a_Q) H + Σ_j exp(a_Q - a_j) dt_j x_j B_jᵀ

Every exponent is a difference ≤ 0, so nothing overflows however strong the decay. C Bᵀ and the products with the
state are taken once a group, with the heads of the group side by side in one matrix.
"""

import torch

from riverrun.kernels.common.chunks import chunk_layout


def ssd_chunked(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.ssd.ssd` in chunks of `chunk_size` tokens. Padding has dt = 0: it leaves the state alone."""
    (H, P), (G, N) = x.shape[2:], B.shape[2:]
    R = H // G  # heads of a group
    dtype = torch.promote_types(x.dtype, torch.float32)
    chunks = chunk_layout(x, min(chunk_size, x.shape[1]), cu_seqlens)
    M, Q = chunks.index.shape

    dt = chunks.split(dt).to(dtype)
    B, C = (chunks.split(t).to(dtype).transpose(1, 2).contiguous() for t in (B, C))  # (M, G, Q, N)
    dtx = chunks.split(x).to(dtype) * dt[..., None]  # (M, Q, H, P)
    a = (dt * A.to(dtype)).cumsum(1)  # (M, Q, H)

    # what the chunk adds to the state by its end
    kept = (dtx * (a[:, -1:] - a).exp()[..., None]).view(M, Q, G, R * P)
    added = (kept.permute(0, 2, 3, 1) @ B).view(M, H, P, N)

    num_sequences = len(chunks.order)
    state = x.new_zeros(num_sequences, H, P, N, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    starts, final_state = chunks.scan(
        lambda h, decay, added: torch.addcmul(added, decay, h), state, a[:, -1, :, None, None].exp(), added
    )

    # outputs: from the state at the start of the chunk, and from the tokens of the chunk itself
    y = (C @ starts.view(M, G, R * P, N).mT).transpose(1, 2).reshape(M, Q, H, P) * a.exp()[..., None]
    a = a.mT
    later = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    L = (a[..., :, None] - a[..., None, :]).masked_fill(later, -torch.inf).exp()  # (M, H, Q, Q)
    scores = (L.view(M, G, R, Q, Q) * (C @ B.mT)[:, :, None]).view(M, H, Q, Q)
    y = y + (scores @ dtx.transpose(1, 2)).transpose(1, 2)

    y = chunks.join(y)
    if D is not None:
        y = y + D.to(dtype).view(H, -1) * x.to(dtype)
    return y.to(x.dtype), final_state
