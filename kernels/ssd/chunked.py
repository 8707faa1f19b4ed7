"""The state space dual recurrence in chunks of Q tokens: matrix products over all chunks at once, a short scan between.

Mamba-2 (arXiv 2405.21060, §6). With a_i = Σ_{j≤i} dt_j A inside a chunk and H the state (P, N) at its start:

    Y  = (L ⊙ C Bᵀ) (dt ⊙ X) + diag(eᵃ) C Hᵀ + D X        L_ij = exp(a_i - a_j) for j ≤ i, else 0
    H' = exp(a_Q) H + Σ_j exp(a_Q - a_j) dt_j x_j B_jᵀ

Every exponent is a difference ≤ 0, so nothing overflows however strong the decay. C Bᵀ and the products with the
state are taken once a group, with the heads of the group side by side in one matrix.
"""

import torch

from riverrun.kernels.common.chunks import Chunks, chunk_layout
from riverrun.kernels.ssd.steps import step_sizes


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

    C = chunks.split(C).to(dtype).transpose(1, 2).contiguous()  # (M, G, Q, N)
    B, dtx, a, added = _added(x, dt, A, B, chunks, dtype)
    num_sequences = len(chunks.order)
    state = x.new_zeros(num_sequences, H, P, N, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    starts, final_state = _scan(chunks, state, a, added)

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


def ssd_summary(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What whole sequences do to a state, without any outputs: final state = decay · initial state + E.

    Args:
        x, dt, A, B, dt_bias, dt_softplus, cu_seqlens, chunk_size: as of `ssd`.

    Returns:
        The decay exp(Σ Δ A) (S, H), and E (S, H, P, N), the final state from zeros, in float32 (float64 if `x` is
        float64).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        chunks = chunk_layout(x, min(chunk_size, x.shape[1]), cu_seqlens)
        _, _, a, added = _added(x, step_sizes(x, dt, dt_bias, dt_softplus), A, B, chunks, dtype)
        zeros = added.new_zeros(len(chunks.order), *added.shape[1:])
        _, final = _scan(chunks, zeros, a, added)
        _, total = chunks.scan(torch.add, zeros[:, :, 0, 0], a[:, -1])
    return total.exp(), final


def _added(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, chunks: Chunks, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """B (M, G, Q, N), Δ x (M, Q, H, P) and the decays a (M, Q, H) in chunks; what each chunk adds to the state by its
    end, (M, H, P, N)."""
    (H, P), (G, N) = x.shape[2:], B.shape[2:]
    M, Q = chunks.index.shape
    dt = chunks.split(dt).to(dtype)
    B = chunks.split(B).to(dtype).transpose(1, 2).contiguous()
    dtx = chunks.split(x).to(dtype) * dt[..., None]
    a = (dt * A.to(dtype)).cumsum(1)
    kept = (dtx * (a[:, -1:] - a).exp()[..., None]).view(M, Q, G, H // G * P)
    return B, dtx, a, (kept.permute(0, 2, 3, 1) @ B).view(M, H, P, N)


def _scan(
    chunks: Chunks, state: torch.Tensor, a: torch.Tensor, added: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states at the start of each chunk, and at the end of each sequence."""
    return chunks.scan(
        lambda h, decay, added: torch.addcmul(added, decay, h), state, a[:, -1, :, None, None].exp(), added
    )
