"""What the gates of a chunk make of its gradients: how much of each is in the memory that each token reads.

With β_t and m_t the products of what is kept of weights and momentum from the chunk's start to token t,

    L_a = β_t / β_j, L_e = m_j / m_i for j ≤ t and i ≤ j        G = L_a L_e diag(θ)     N = L_e diag(θ)     f = L_a m

so that, with A and S at the chunk's start and D_i the gradient of token i,

    A_t = β_t A + f_t S − Σ_i G_ti D_i        S_t = m_t S − Σ_i N_ti D_i

(Titans' chunk form, arXiv 2501.00663, §3.2, with a token's own gates.) Entries of L_a and L_e are exponentials of sums
of logarithms, never quotients of products; the sum inside G has a closed form that cancels, hence the product.

No gates would leave a momentum alone, so padding is left out by these matrices instead: it keeps all, and what it
would add to the weights is masked.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from riverrun.kernels.diagonal_scan import diagonal_scan
from riverrun.kernels.neural_memory.rule import Gates


class ChunkGates(NamedTuple):
    """Of M chunks of b tokens and H heads; s gradients enter a chunk, b of its own tokens after those of a window.

    Gates of their own for every output of a layer add a dimension R before b, or before (b, s).

    Attributes:
        decay: β (M, H, b).
        weight: G (M, H, b, s).
        carry: f (M, H, b); None without momentum.
        momentum_decay: m_b (M, H); None without momentum.
        momentum_weight: N_b (M, H, s); None without momentum.
    """

    decay: torch.Tensor
    weight: torch.Tensor
    carry: torch.Tensor | None
    momentum_decay: torch.Tensor | None
    momentum_weight: torch.Tensor | None


def chunk_gates(gates: Gates, valid: torch.Tensor, sources: torch.Tensor | None = None) -> ChunkGates:
    """Of gates (M, H, b) or (M, H, R, b) in chunks, zeros at padding; valid (M, b) is False there.

    Args:
        sources: (M, H, b, s) how much of each gradient each token's own step is made of; None: of its own.
    """
    log_keep, lr, log_momentum = gates
    own = lr.ndim == 4 or log_keep.ndim == 4 or (log_momentum is not None and log_momentum.ndim == 4)
    if own:
        log_keep, lr = (x if x.ndim == 4 else x[:, :, None] for x in (log_keep, lr))
        sources = sources if sources is None else sources[:, :, None]
    valid = valid[:, None, None] if own else valid[:, None]  # (M, 1, [1,] b)
    kept = _between(log_keep)
    enters = torch.diag_embed(lr) if sources is None else lr[..., None] * sources
    if log_momentum is None:
        weight = kept @ enters if sources is not None else kept * lr[..., None, :]
        return ChunkGates(log_keep.cumsum(-1).exp(), weight, None, None, None)
    log_momentum = log_momentum[:, :, None] if own and log_momentum.ndim == 3 else log_momentum
    momentum = log_momentum.cumsum(-1).exp()
    into = _between(log_momentum)
    into = into @ enters if sources is not None else into * lr[..., None, :]  # N
    kept = kept * valid[..., None, :]
    return ChunkGates(
        log_keep.cumsum(-1).exp(),
        kept @ into,
        (kept @ momentum[..., None]).squeeze(-1),
        momentum[..., -1],
        into[..., -1, :],
    )


def chunk_ends(gates: Gates, valid: torch.Tensor) -> ChunkGates:
    """The same of the chunks' last rows only (b = 1 there), without matrices of b × b: what long chunks need.

    x_i = Σ_{j ≥ i} (β_b / β_j)(m_j / m_i) is a recurrence from the end, x_i = β_b / β_i + η_{i+1} x_{i+1}; f = η_1 x_1.
    """
    log_keep, lr, log_momentum = gates
    assert lr.ndim == log_keep.ndim == 3
    logs = log_keep[None] if log_momentum is None else torch.stack([log_keep, log_momentum])
    logs, lr = logs.flip(-1), lr.flip(-1)  # from the last token to the first
    sums = logs.cumsum(-1)
    whole, to_end = sums[..., -1].exp(), F.pad(sums[..., :-1], (1, 0)).exp()
    if log_momentum is None:
        return ChunkGates(whole[0, ..., None], (to_end[0] * lr).flip(-1)[..., None, :], None, None, None)
    kept = to_end[0] * valid.flip(-1)[:, None]
    momentum = F.pad(logs[1, ..., :-1].exp(), (1, 0))
    x, _ = diagonal_scan(kept.movedim(-1, 1), momentum.movedim(-1, 1))
    x = x.movedim(1, -1)
    carry = x[..., -1:] * logs[1, ..., -1:].exp()
    weight, momentum_weight = (torch.stack([x, to_end[1]]) * lr).flip(-1).unbind(0)
    return ChunkGates(whole[0, ..., None], weight[..., None, :], carry, whole[1], momentum_weight)


def late(gates: ChunkGates) -> ChunkGates:
    """Those of the token before: of the memory that a token finds."""
    first = torch.ones_like(gates.decay[..., :1])
    carry = None if gates.carry is None else torch.cat([torch.zeros_like(first), gates.carry[..., :-1]], dim=-1)
    weight = torch.cat([torch.zeros_like(gates.weight[..., :1, :]), gates.weight[..., :-1, :]], dim=-2)
    return gates._replace(decay=torch.cat([first, gates.decay[..., :-1]], dim=-1), carry=carry, weight=weight)


def triton_gates(gates: Gates, chunk_size: int, cu_seqlens: torch.Tensor | None) -> ChunkGates:
    """Of gates (B, T, H), for the chunks that Triton kernels count (`triton_chunks`). Nothing waits for the device. In
    some ten passes over memory: `triton_gates.py` takes one."""
    from riverrun.kernels.common.triton_chunks import cut

    B, T, H = gates.lr.shape
    chunks = cut(gates.lr, chunk_size, cu_seqlens)
    place = torch.arange(chunk_size, device=gates.lr.device)
    if chunks.packed:
        start, length = chunks.tensors[2:]
        valid = place < length[:, None]
        index = (start[:, None] + place).clamp_max(B * T - 1)
    else:
        row, at = torch.arange(chunks.num_chunks, device=place.device)[:, None].expand(-1, chunk_size), place
        per_row = chunks.num_chunks // B
        at = row % per_row * chunk_size + place
        valid = at < T
        index = row // per_row * T + at.clamp_max(T - 1)

    def split(x: torch.Tensor) -> torch.Tensor:
        parts = x.reshape(B * T, H).index_select(0, index.flatten()).view(*index.shape, H)
        return parts.masked_fill(~valid[..., None], 0).transpose(1, 2)  # (M, H, b)

    return chunk_gates(gates.each(split), valid)


def _between(log: torch.Tensor) -> torch.Tensor:
    """(…, b) → (…, b, b): exp of the sum over (j, t], for j ≤ t; 0 for j > t. Each is a sum of its own, not the
    difference of two long ones."""
    b = log.shape[-1]
    lower = torch.ones(b, b, dtype=torch.bool, device=log.device).tril
    sums = log[..., :, None].expand(*log.shape, b).masked_fill(~lower(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower(), -torch.inf).exp()
