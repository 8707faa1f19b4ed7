"""The gradients of a chunk, from the state S at its start, the adjoint dS' at its end, W and Y (see `triton_walk.py`).

With Ā_ij = exp(G_i − G_j) ⟨k_i, k_j⟩ for j < i, so that W = R − Ā V̂ and V̂ = β W, and with Y the adjoint of V̂:

    dV = β Y        dβ_i = ⟨Y_i, W_i⟩        dĀ = −β Y V̂ᵀ        dP = dO V̂ᵀ
    dQ = scale γ dO Sᵀ + dP K                dK = exp(G_C − G) V̂ dS'ᵀ − β γ Y Sᵀ + dPᵀ Q + (dĀ + dĀᵀ) K

where dP and dĀ stand for themselves times their decays; G gains what each factor exp(±G) carries. No division, so that
β = 0 needs no care. dQ and dK are summed times r, for q̂ = r q and k̂ = r k of unit length.

All of this is more than the registers of a program hold, if others are to share its multiprocessor and compute while it
waits for memory. `triton_within.py` has the first line, and hands on X = dP and Z = dĀ + dĀᵀ. Here two programs share a
chunk, one has dQ, the other dK: they run side by side, so that what both load is loaded once.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.common.triton_math import dot, exp
from riverrun.kernels.gated_delta.triton_products import load_rows, load_tiles, store_tiles


@triton.jit
def _row_products(x, y, NK: tl.constexpr):
    """⟨x_i, y_i⟩ of rows."""
    out = tl.sum(x[0] * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, NK):
        out += tl.sum(x[i] * y[i].to(tl.float32), 1)
    return out


@triton.jit
def _of_raw(adjoint, raw, r, NORMALISE: tl.constexpr, NK: tl.constexpr):
    """The gradient of x, where x̂ = r x, from r dx̂: r dx̂ − r² x ⟨x, r dx̂⟩."""
    if NORMALISE:
        along = _row_products(adjoint, raw, NK) * r * r
        out = ()
        for i in tl.static_range(NK):
            out = out + (adjoint[i] - raw[i].to(tl.float32) * along[:, None],)
        return out
    else:
        return adjoint


@triton.jit
def _through_states(sums, x, states, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr):
    """sums + x Sᵀ: for rows x (R, BV) and the columns `column` of a state (K, V)."""
    out = ()
    for i in tl.static_range(NK):
        row = i * BK + tl.arange(0, BK)
        S = load_rows(states, row, row < K, V, column, V)
        out = out + (dot(x, tl.trans(S.to(x.dtype)), sums[i]),)
    return out


@triton.jit
def gradients_kernel(
    grad_o,  # (B, T, H, V)
    q,  # (B, T, H, K)
    k,  # (B, T · n, H, K)
    beta,  # (B, T · n, H)
    decay,  # (M, H, C) float32
    units,  # (M, H, C) float32
    reads,  # (M, H, QP) float32
    units_q,  # (M, H, QP) float32
    states,  # (M, H, K, V)
    grad_states,  # (M, H, K, V)
    W,  # (B, T · n, H, V)
    Y,  # (B, T · n, H, V)
    X,  # (M, H, QP, C)
    Z,  # (M, H, C, C)
    by_G,  # (M, H, C) float32: what G has within the chunk,
    by_G_q,  # (M, H, QP) float32: and at the last steps of its tokens
    grad_q,
    grad_k,
    grad_g,  # (2, B, T, H) float32
    start,
    length,
    T,
    all_tokens,
    v_end,  # V, as for `within_kernel`
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
    NORMALISE: tl.constexpr,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    part, c, h = tl.program_id(0) % 2, tl.program_id(0) // 2, tl.program_id(1)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    if tokens > 0:
        index = tl.cast(c, tl.int64) * H + h
        step, t = tl.arange(0, C), tl.arange(0, QP)
        here, here_q = step < tokens * n, t < tokens
        p_k, p_q = k + (token * n * H + h) * K, q + (token * H + h) * K
        products = X + index * QP * C + t[:, None] * C + step[None, :]
        if part == 0:
            by_q = ()
            for _ in tl.static_range(NK):
                by_q = by_q + (tl.zeros([QP, BK], tl.float32),)
            for v_start in tl.range(0, v_end, BV, num_stages=STAGES):
                column = v_start + tl.arange(0, BV)
                g_o = load_rows(grad_o + (token * H + h) * V, t, here_q, H * V, column, V)
                by_q = _through_states(by_q, g_o, states + index * K * V, column, K, V, BK, NK)
            q_tiles = load_tiles(p_q, t, here_q, H * K, K, BK, NK)
            factor = tl.load(reads + index * QP + t)
            if GATED:
                at_last_step = step[None, :] == (t * n + (n - 1))[:, None]
                of_G_q = tl.load(by_G_q + index * QP + t) + _row_products(by_q, q_tiles, NK) * factor
                of_G = tl.sum(tl.where(at_last_step, of_G_q[:, None], 0.0), 0)
                of_end = 0.0
            k_tiles = load_tiles(p_k, step, here, H * K, K, BK, NK)
            new_q = ()
            for i in tl.static_range(NK):
                new_q = new_q + (dot(tl.load(products), k_tiles[i], by_q[i] * factor[:, None]),)
            new_q = _of_raw(new_q, q_tiles, tl.load(units_q + index * QP + t), NORMALISE, NK)
            store_tiles(grad_q + (token * H + h) * K, new_q, t, here_q, H * K, K, BK, NK)
        else:
            G, G_end = tl.load(decay + index * C + step), tl.load(decay + index * C + C - 1)
            r_k = tl.load(units + index * C + step)
            b = tl.load(beta + (token * n + step) * H + h, mask=here, other=0.0).to(tl.float32) * r_k
            p_v = (token * n * H + h) * V
            by_k = ()
            for _ in tl.static_range(NK):
                by_k = by_k + (tl.zeros([C, BK], tl.float32),)
            for v_start in tl.range(0, v_end, BV, num_stages=STAGES):
                column = v_start + tl.arange(0, BV)
                y = load_rows(Y + p_v, step, here, H * V, column, V).to(tl.float32)
                taken = (y * (-b * exp(G))[:, None]).to(dtype)
                by_k = _through_states(by_k, taken, states + index * K * V, column, K, V, BK, NK)
            if GATED:
                of_read = _row_products(by_k, load_tiles(p_k, step, here, H * K, K, BK, NK), NK)
            flow = tl.zeros([BK], tl.float32)  # ⟨dS', S⟩
            for v_start in tl.range(0, v_end, BV, num_stages=STAGES):
                column = v_start + tl.arange(0, BV)
                w = load_rows(W + p_v, step, here, H * V, column, V).to(tl.float32)
                written = (w * (b * exp(G_end - G))[:, None]).to(dtype)
                by_k = _through_states(by_k, written, grad_states + index * K * V, column, K, V, BK, NK)
                if GATED:
                    for i in tl.static_range(NK):
                        row = i * BK + tl.arange(0, BK)
                        S = load_rows(states + index * K * V, row, row < K, V, column, V).to(tl.float32)
                        dS = load_rows(grad_states + index * K * V, row, row < K, V, column, V).to(tl.float32)
                        flow += tl.sum(S * dS, 1)
            k_tiles = load_tiles(p_k, step, here, H * K, K, BK, NK)
            if GATED:
                of_written = _row_products(by_k, k_tiles, NK) - of_read
                of_G = tl.load(by_G + index * C + step) + of_read - of_written
                of_end = tl.sum(of_written) + exp(G_end) * tl.sum(flow)
            q_tiles = load_tiles(p_q, t, here_q, H * K, K, BK, NK)
            of_keys = tl.load(Z + (index * C + step)[:, None] * C + step[None, :])
            new_k = ()
            for i in tl.static_range(NK):
                new_k = new_k + (dot(of_keys, k_tiles[i], dot(tl.trans(tl.load(products)), q_tiles[i], by_k[i])),)
            new_k = _of_raw(new_k, k_tiles, r_k, NORMALISE, NK)
            store_tiles(grad_k + (token * n * H + h) * K, new_k, step, here, H * K, K, BK, NK)
        if GATED:  # the gate of a token enters every G from its first step on
            by_gate = tl.sum(of_G) - tl.cumsum(of_G, 0) + of_G + of_end
            p_g = grad_g + (part * all_tokens + token + step // n) * H + h
            tl.store(p_g, by_gate, mask=here & (step % n == 0))
