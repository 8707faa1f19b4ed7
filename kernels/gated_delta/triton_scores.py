"""P_tj = scale · exp(G_t − G_j) ⟨q_t, k_j⟩ of every chunk, for the sub-steps j up to token t's last and q, k of unit
length; with it the factor by which a query reads the chunk's first state, and that which brings it to unit length."""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.common.triton_math import exp
from riverrun.kernels.gated_delta.triton_products import inner, load_tiles, unit


@triton.jit
def scores_kernel(
    q,  # (B, T, H, K)
    k,  # (B, T · n, H, K)
    decay,  # (M, H, C) float32
    units,  # (M, H, C) float32
    scores,  # (M, H, QP, C): P
    reads,  # (M, H, QP) float32: scale · exp(G_t) / ‖q_t‖
    units_q,  # (M, H, QP) float32: 1 / ‖q_t‖, or 1
    start,
    length,
    T,
    scale,
    H: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    QP: tl.constexpr,  # rows of the tiles of q, a power of two from 16 on
    BK: tl.constexpr,
    NK: tl.constexpr,
    NORMALISE: tl.constexpr,
    PACKED: tl.constexpr,
):
    c, h = tl.program_id(0), tl.program_id(1)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    if tokens > 0:
        index = tl.cast(c, tl.int64) * H + h
        step, t = tl.arange(0, C), tl.arange(0, QP)
        q_tiles = load_tiles(q + (token * H + h) * K, t, t < tokens, H * K, K, BK, NK)
        k_tiles = load_tiles(k + (token * n * H + h) * K, step, step < tokens * n, H * K, K, BK, NK)
        G = tl.load(decay + index * C + step)
        G_q = tl.load(decay + index * C + t * n, mask=t < Q, other=0.0)
        r_k = tl.load(units + index * C + step)
        r_q = unit(q_tiles, NORMALISE, NK)
        tl.store(units_q + index * QP + t, r_q)
        r_q *= scale
        tl.store(reads + index * QP + t, r_q * exp(G_q))
        P = inner(q_tiles, k_tiles, NK) * r_q[:, None] * r_k[None, :]
        P *= exp(tl.minimum(G_q[:, None] - G[None, :], 0.0))
        P = tl.where((step // n)[None, :] <= t[:, None], P, 0.0)
        p = scores + (index * QP + t)[:, None] * C + step[None, :]
        tl.store(p, P.to(scores.dtype.element_ty))
