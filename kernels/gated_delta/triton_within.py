"""The gradients of what happens within a chunk: of V, β, and the two matrices of products of its queries and keys (see
`triton_gradients.py`, whose names these are).

    dV = β Y        dβ_i = ⟨Y_i, W_i⟩        dP = dO V̂ᵀ        dĀ = −β Y V̂ᵀ

dP and dĀ leave times their decays and the factors of unit length: X_tj is the gradient of ⟨q_t, k_j⟩, and Z_ij, which
is symmetric, that of ⟨k_i, k_j⟩. The log decays G get sums over rows and columns of dP ⊙ P and dĀ ⊙ Ā.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.common.triton_math import dot, exp
from riverrun.kernels.gated_delta.triton_products import inner, load_rows, load_tiles, store_rows


@triton.jit
def within_kernel(
    grad_o,  # (B, T, H, V)
    k,  # (B, T · n, H, K)
    beta,  # (B, T · n, H)
    decay,  # (M, H, C) float32
    units,  # (M, H, C) float32
    scores,  # (M, H, QP, C)
    units_q,  # (M, H, QP) float32
    W,  # (B, T · n, H, V)
    Y,  # (B, T · n, H, V)
    grad_v,
    grad_beta,  # (B, T · n, H) float32
    X,  # (M, H, QP, C)
    Z,  # (M, H, C, C)
    by_G,  # (M, H, C) float32
    by_G_q,  # (M, H, QP) float32
    start,
    length,
    T,
    v_end,  # V, which the compiler is not to know: it would lay out loops of two rounds in a row, and spill
    scale,
    H: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    QP: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    c, h = tl.program_id(0), tl.program_id(1)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    if tokens > 0:
        index = tl.cast(c, tl.int64) * H + h
        step, t = tl.arange(0, C), tl.arange(0, QP)
        here, here_q = step < tokens * n, t < tokens
        place = (token * n * H + h) * V
        b = tl.load(beta + (token * n + step) * H + h, mask=here, other=0.0).to(tl.float32)
        YW = tl.zeros([C, C], tl.float32)
        by_P = tl.zeros([QP, C], tl.float32)
        by_b = tl.zeros([C], tl.float32)
        for v_start in tl.range(0, v_end, BV, num_stages=STAGES):
            column = v_start + tl.arange(0, BV)
            y = load_rows(Y + place, step, here, H * V, column, V)
            w = load_rows(W + place, step, here, H * V, column, V)
            g_o = load_rows(grad_o + (token * H + h) * V, t, here_q, H * V, column, V)
            by_b += tl.sum(y.to(tl.float32) * w.to(tl.float32), 1)
            store_rows(grad_v + place, y.to(tl.float32) * b[:, None], step, here, H * V, column, V)
            w = tl.trans(w.to(dtype))
            YW = dot(y.to(dtype), w, YW)
            by_P = dot(g_o, w, by_P)
        tl.store(grad_beta + (token * n + step) * H + h, by_b, mask=here)

        G = tl.load(decay + index * C + step)
        r_k = tl.load(units + index * C + step)
        YW *= tl.where(step[None, :] < step[:, None], exp(tl.minimum(G[:, None] - G[None, :], 0.0)), 0.0)
        YW *= (-b * r_k)[:, None] * (b * r_k)[None, :]
        tl.store(Z + (index * C + step)[:, None] * C + step[None, :], (YW + tl.trans(YW)).to(dtype))
        if GATED:
            k_tiles = load_tiles(k + (token * n * H + h) * K, step, here, H * K, K, BK, NK)
            YW *= inner(k_tiles, k_tiles, NK)
            of_G = tl.sum(YW, 1) - tl.sum(YW, 0)

        by_P *= b[None, :]
        at = (index * QP + t)[:, None] * C + step[None, :]
        if GATED:
            PP = by_P * tl.load(scores + at).to(tl.float32)
            tl.store(by_G + index * C + step, of_G - tl.sum(PP, 0))
            tl.store(by_G_q + index * QP + t, tl.sum(PP, 1))
        G_q = tl.load(decay + index * C + t * n, mask=t < Q, other=0.0)
        seen = (step // n)[None, :] <= t[:, None]
        by_P *= tl.where(seen, exp(tl.minimum(G_q[:, None] - G[None, :], 0.0)), 0.0)
        r_q = tl.load(units_q + index * QP + t)
        tl.store(X + at, (by_P * (scale * r_q)[:, None] * r_k[None, :]).to(dtype))
