"""The gradients of a chunk, from the state S at its start, the adjoint dS' at its end, and Y (see `triton_walk.py`).

With Ā_ij = exp(G_i − G_j) ⟨k_i, k_j⟩ for j < i, so that V̂_i = β_i (R_i − Σ_j Ā_ij V̂_j), and Y the adjoint of V̂:

    dV = β Y        dβ_i = ⟨Y_i, R_i − Σ_j Ā_ij V̂_j⟩        dĀ = −β Y V̂ᵀ        dP = dO V̂ᵀ
    dQ = scale γ dO Sᵀ + dP K                                 dK = exp(G_C − G) V̂ dS'ᵀ − β γ Y Sᵀ + dPᵀ Q + (dĀ + dĀᵀ) K

where dP and dĀ stand for themselves times their decays; G gains what each factor exp(±G) carries. No division, so that
β = 0 needs no care.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.common.triton_math import dot, exp
from riverrun.kernels.gated_delta.triton_products import inner, load_tiles, product, store_tiles, unit


@triton.jit
def _row_products(x, y, NK: tl.constexpr):
    """⟨x_i, y_i⟩ of rows."""
    out = tl.sum(x[0] * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, NK):
        out += tl.sum(x[i] * y[i].to(tl.float32), 1)
    return out


@triton.jit
def _of_raw(adjoint, raw, r, NORMALISE: tl.constexpr, NK: tl.constexpr):
    """The gradient of x from that of x̂ = r x: r (dx̂ − x̂ ⟨x̂, dx̂⟩)."""
    if NORMALISE:
        along = _row_products(adjoint, raw, NK) * r * r
        out = ()
        for i in tl.static_range(NK):
            out = out + ((adjoint[i] - raw[i].to(tl.float32) * along[:, None]) * r[:, None],)
        return out
    else:
        return adjoint


@triton.jit
def gradients_kernel(
    grad_o,  # (B, T, H, V)
    q,  # (B, T, H, K)
    k,  # (B, T · n, H, K)
    v,  # (B, T · n, H, V)
    beta,  # (B, T · n, H)
    inverse,  # (M, H, C, C)
    decay,  # (M, H, C) float32
    units,  # (M, H, C) float32
    scores,  # (M, H, QP, C)
    reads,  # (M, H, QP) float32
    states,  # (M, H, K, V)
    grad_states,  # (M, H, K, V)
    KS,  # (B, T · n, H, V)
    Y,  # (B, T · n, H, V)
    grad_q,
    grad_k,
    grad_v,
    grad_beta,  # (B, T · n, H) float32
    grad_g,  # (B, T, H) float32
    start,
    length,
    T,
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
    NORMALISE: tl.constexpr,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    c, h = tl.program_id(0), tl.program_id(1)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    if tokens > 0:
        index = tl.cast(c, tl.int64) * H + h
        place = index * C
        step, t = tl.arange(0, C), tl.arange(0, QP)
        here, here_q = step < tokens * n, t < tokens

        p_k, p_q = k + (token * n * H + h) * K, q + (token * H + h) * K
        T_inverse = tl.load(inverse + place * C + step[:, None] * C + step[None, :])
        G = tl.load(decay + place + step)
        G_q = tl.load(decay + place + t * n, mask=t < Q, other=0.0)
        G_end = tl.load(decay + place + C - 1)
        r_k = tl.load(units + place + step)
        b = tl.load(beta + (token * n + step) * H + h, mask=here, other=0.0).to(tl.float32)

        # what needs no state: two matrices of the chunk, and sums of rows
        by_P = tl.zeros([QP, C], tl.float32)
        YV = tl.zeros([C, C], tl.float32)
        by_b = tl.zeros([C], tl.float32)
        erased = tl.zeros([C], tl.float32)  # ⟨βY, K S⟩ of rows
        for v_start in range(0, V, BV):
            column = v_start + tl.arange(0, BV)
            mask_v, mask_o = here[:, None] & (column < V)[None, :], here_q[:, None] & (column < V)[None, :]
            at_v = (token * n * H + h) * V + step[:, None] * (H * V) + column[None, :]
            y = tl.load(Y + at_v, mask=mask_v, other=0.0).to(tl.float32)
            of_state = tl.load(KS + at_v, mask=mask_v, other=0.0).to(tl.float32)
            R = tl.load(v + at_v, mask=mask_v, other=0.0).to(tl.float32) - of_state * (exp(G) * r_k)[:, None]
            corrected = tl.trans(product(T_inverse, R * b[:, None], dtype, EXACT).to(dtype))
            at_o = (token * H + h) * V + t[:, None] * (H * V) + column[None, :]
            by_P = dot(tl.load(grad_o + at_o, mask=mask_o, other=0.0), corrected, by_P)
            YV = dot(y.to(dtype), corrected, YV)
            by_b += tl.sum(y * R, 1)
            y *= b[:, None]
            erased += tl.sum(y * of_state, 1)
            tl.store(grad_v + at_v, y.to(grad_v.dtype.element_ty), mask=mask_v)

        # within the chunk
        k_tiles = load_tiles(p_k, step, here, H * K, K, BK, NK)
        q_tiles = load_tiles(p_q, t, here_q, H * K, K, BK, NK)
        r_q = unit(q_tiles, NORMALISE, NK)
        earlier = step[None, :] < step[:, None]
        between = tl.where(earlier, exp(tl.minimum(G[:, None] - G[None, :], 0.0)), 0.0)
        A = inner(k_tiles, k_tiles, NK) * r_k[:, None] * r_k[None, :] * between
        by_b -= tl.sum(A * YV, 1)
        tl.store(grad_beta + (token * n + step) * H + h, by_b, mask=here)
        by_A = YV * -b[:, None]
        PP = by_P * tl.load(scores + (index * QP + t)[:, None] * C + step[None, :]).to(tl.float32)
        AA = by_A * A
        by_G, by_G_q = tl.sum(AA, 1) - tl.sum(AA, 0) - tl.sum(PP, 0), tl.sum(PP, 1)
        by_A *= between
        by_products = ((by_A + tl.trans(by_A)) * r_k[None, :]).to(dtype)
        seen = (step // n)[None, :] <= t[:, None]
        by_P *= tl.where(seen, exp(tl.minimum(G_q[:, None] - G[None, :], 0.0)), 0.0) * scale
        from_q = (tl.trans(by_P) * r_q[None, :]).to(dtype)
        from_k = (by_P * r_k[None, :]).to(dtype)

        # through the states
        by_q, by_k = (), ()
        for _ in tl.static_range(NK):
            by_q = by_q + (tl.zeros([QP, BK], tl.float32),)
            by_k = by_k + (tl.zeros([C, BK], tl.float32),)
        flow = tl.zeros([BK], tl.float32)  # ⟨dS', S⟩
        for v_start in range(0, V, BV):
            column = v_start + tl.arange(0, BV)
            mask_v, mask_o = here[:, None] & (column < V)[None, :], here_q[:, None] & (column < V)[None, :]
            at_v = (token * n * H + h) * V + step[:, None] * (H * V) + column[None, :]
            of_state = tl.load(KS + at_v, mask=mask_v, other=0.0).to(tl.float32)
            R = tl.load(v + at_v, mask=mask_v, other=0.0).to(tl.float32) - of_state * (exp(G) * r_k)[:, None]
            corrected = product(T_inverse, R * b[:, None], dtype, EXACT)
            written = (corrected * exp(G_end - G)[:, None]).to(dtype)
            y = tl.load(Y + at_v, mask=mask_v, other=0.0).to(tl.float32)
            taken = (y * (-b * exp(G))[:, None]).to(dtype)
            at_o = (token * H + h) * V + t[:, None] * (H * V) + column[None, :]
            g_o = tl.load(grad_o + at_o, mask=mask_o, other=0.0)
            new_q, new_k = (), ()
            for i in tl.static_range(NK):
                row = i * BK + tl.arange(0, BK)
                at_s = index * K * V + row[:, None] * V + column[None, :]
                mask_s = (row < K)[:, None] & (column < V)[None, :]
                S = tl.load(states + at_s, mask=mask_s, other=0.0)
                dS = tl.load(grad_states + at_s, mask=mask_s, other=0.0)
                flow += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
                S = tl.trans(S.to(dtype))
                new_q = new_q + (dot(g_o, S, by_q[i]),)
                new_k = new_k + (dot(taken, S, dot(written, tl.trans(dS.to(dtype)), by_k[i])),)
            by_q, by_k = new_q, new_k

        # together; the tiles again, which were not to be held through the loop
        k_tiles = load_tiles(p_k, step, here, H * K, K, BK, NK)
        q_tiles = load_tiles(p_q, t, here_q, H * K, K, BK, NK)
        if GATED:
            by_G_q += _row_products(by_q, q_tiles, NK) * tl.load(reads + index * QP + t)
            of_read = -erased * exp(G) * r_k
            of_written = _row_products(by_k, k_tiles, NK) * r_k - of_read
            at_last_step = step[None, :] == (t * n + (n - 1))[:, None]
            by_G += of_read - of_written + tl.sum(tl.where(at_last_step, by_G_q[:, None], 0.0), 0)
            by_end = tl.sum(of_written) + exp(G_end) * tl.sum(flow)
            # the gate of a token enters every G from its first step on
            by_gate = tl.sum(by_G) - tl.cumsum(by_G, 0) + by_G + by_end
            tl.store(grad_g + (token + step // n) * H + h, by_gate, mask=here & (step % n == 0))
        new_q, new_k = (), ()
        for i in tl.static_range(NK):
            new_q = new_q + (dot(from_k, k_tiles[i], by_q[i] * (scale * exp(G_q))[:, None]),)
            new_k = new_k + (dot(by_products, k_tiles[i], dot(from_q, q_tiles[i], by_k[i])),)
        by_q, by_k = _of_raw(new_q, q_tiles, r_q, NORMALISE, NK), _of_raw(new_k, k_tiles, r_k, NORMALISE, NK)
        store_tiles(grad_q + (token * H + h) * K, by_q, t, here_q, H * K, K, BK, NK)
        store_tiles(grad_k + (token * n * H + h) * K, by_k, step, here, H * K, K, BK, NK)
