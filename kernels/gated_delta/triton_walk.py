"""The two walks over a sequence's chunks: the state forwards, its adjoint backwards. A program owns one sequence, one
head and BV channels of the values.

With the names of `chunked.py`, and k, q of unit length:

    R  = V − γ K S              V̂ = T β R,  or  W = R − U (β R) and V̂ = β W
    O  = scale γ Q S + P V̂      S' = γ_C S + Σ_j exp(G_C − G_j) k_j V̂_jᵀ

with T β or U from `triton_inverse.py` and P from `triton_scores.py`; and backwards, from dO and the adjoint dS' of the
state at the chunk's end,

    dV̂ = Pᵀ dO + diag(exp(G_C − G)) K dS'         Y = dV̂ − Uᵀ (β dV̂)
    dS = γ_C dS' + scale (γ Q)ᵀ dO − (β γ K)ᵀ Y

Where few sequences and heads leave a GPU idle, segments are walked first for their affine maps S ↦ M S + U: with V and
O left out, K more columns of state that start as the identity become M (`triton_segments.py`).

States are held transposed, (BV, K): each product of the chain from state to state then has its left operand in
registers, where the product before has left it, and k, q and U as they lie in memory on the right.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import sequence
from riverrun.kernels.common.triton_math import exp
from riverrun.kernels.gated_delta.triton_products import load_tiles, product, read


@triton.jit
def _load_state(p, column, V: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr):
    """A state (K, V) as transposed tiles (BV, BK) in float32."""
    out = ()
    for i in tl.static_range(NK):
        row = i * BK + tl.arange(0, BK)
        mask = (column < V)[:, None] & (row < K)[None, :]
        out = out + (tl.load(p + row[None, :] * V + column[:, None], mask=mask, other=0.0).to(tl.float32),)
    return out


@triton.jit
def _store_state(p, tiles, column, V: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr):
    for i in tl.static_range(NK):
        row = i * BK + tl.arange(0, BK)
        mask = (column < V)[:, None] & (row < K)[None, :]
        tl.store(p + row[None, :] * V + column[:, None], tiles[i].to(p.dtype.element_ty), mask=mask)


@triton.jit
def _identity_from(V: tl.constexpr, column, BK: tl.constexpr, NK: tl.constexpr):
    """Zeros, and from column V on the identity."""
    out = ()
    for i in tl.static_range(NK):
        row = i * BK + tl.arange(0, BK)
        out = out + (tl.where(column[:, None] - V == row[None, :], 1.0, 0.0),)
    return out


@triton.jit
def forward_kernel(
    q,  # (B, T, H, K)
    k,  # (B, T · n, H, K)
    v,  # (B, T · n, H, V)
    beta,  # (B, T · n, H)
    inverse,  # (M, H, C, C): T diag(β) if FORWARD, else U
    decay,  # (M, H, C) float32
    units,  # (M, H, C) float32
    scores,  # (M, H, QP, C)
    reads,  # (M, H, QP) float32
    initial,  # (S, H, K, V) float32
    o,  # (B, T, H, V)
    states,  # (M, H, K, V): the states at the chunks' starts
    W,  # (B, T · n, H, V)
    final,  # (S, H, K, V) float32; or maps (S, H, K, V + K): U, M
    wanted,  # (S,) which maps
    cu_seqlens,
    first,
    T,
    H: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    QP: tl.constexpr,  # rows of the tiles of q, a power of two from 16 on
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    FORWARD: tl.constexpr,
    OUTPUT: tl.constexpr,  # o and the final state,
    STATES: tl.constexpr,  # or the states and W, or else maps
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    COLUMNS: tl.constexpr = V if OUTPUT or STATES else V + K
    s, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    begin, tokens, c = sequence(cu_seqlens, first, s, T, Q, PACKED)
    step, t = tl.arange(0, C), tl.arange(0, QP)

    if HAS_INITIAL:
        state = _load_state(initial + (s * H + h) * K * V, column, V, K, BK, NK)
    else:
        state = _identity_from(V, column, BK, NK)
    if COLUMNS > V:
        tokens = tl.where(tl.load(wanted + s) != 0, tokens, 0)
    for at in tl.range(0, tokens, Q, num_stages=STAGES):
        token = begin + at
        index = (c + at // Q) * H + h
        place = index * C
        left = tl.minimum(tokens - at, Q)
        here = step < left * n
        if STATES:
            _store_state(states + index * K * V, state, column, V, K, BK, NK)
        k_tiles = load_tiles(k + (token * n * H + h) * K, step, here, H * K, K, BK, NK)
        at_v = (token * n * H + h) * V + step[None, :] * (H * V) + column[:, None]
        mask_v = here[None, :] & (column < V)[:, None]
        values = tl.load(v + at_v, mask=mask_v, other=0.0)
        solve = tl.load(inverse + place * C + step[:, None] * C + step[None, :])
        G = tl.load(decay + place + step)
        r_k = tl.load(units + place + step)
        b = tl.load(beta + (token * n + step) * H + h, mask=here, other=0.0).to(tl.float32)
        G_end = tl.load(decay + place + C - 1)

        of_state = read(state, k_tiles, dtype, PARTS, NK)
        R = values.to(tl.float32) - of_state * (exp(G) * r_k)[None, :]
        if FORWARD:
            corrected = product(R, tl.trans(solve), dtype, PARTS)
        else:
            R -= product(R * b[None, :], tl.trans(solve), dtype, PARTS)
            if STATES:
                tl.store(W + at_v, R.to(W.dtype.element_ty), mask=mask_v)
            corrected = R * b[None, :]
        if OUTPUT:
            q_tiles = load_tiles(q + (token * H + h) * K, t, t < left, H * K, K, BK, NK)
            factor = tl.load(reads + index * QP + t)
            P = tl.load(scores + (index * QP + t)[:, None] * C + step[None, :])
            out = read(state, q_tiles, dtype, 1, NK) * factor[None, :]
            out += product(corrected, tl.trans(P), dtype, 1)
            p_o = o + (token * H + h) * V + t[None, :] * (H * V) + column[:, None]
            tl.store(p_o, out.to(o.dtype.element_ty), mask=(t < left)[None, :] & (column < V)[:, None])
        written = corrected * (exp(G_end - G) * r_k)[None, :]
        new = ()
        for i in tl.static_range(NK):
            new = new + (state[i] * exp(G_end) + product(written, k_tiles[i], dtype, PARTS),)
        state = new
    if not STATES:
        _store_state(final + (s * H + h) * K * COLUMNS, state, column, COLUMNS, K, BK, NK)


@triton.jit
def backward_kernel(
    grad_o,  # (B, T, H, V)
    grad_final,  # (S, H, K, V) float32
    q,
    k,
    beta,
    inverse,  # U
    decay,
    units,
    scores,
    reads,
    grad_states,  # (M, H, K, V): the adjoints of the states at the chunks' ends
    Y,  # (B, T · n, H, V)
    grad_initial,  # (S, H, K, V) float32
    wanted,  # (S,) which grad_initial
    cu_seqlens,
    first,
    T,
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
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    STATES: tl.constexpr,  # the adjoints and Y too, or grad_initial alone
    PACKED: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    s, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    begin, tokens, c = sequence(cu_seqlens, first, s, T, Q, PACKED)
    step, t = tl.arange(0, C), tl.arange(0, QP)
    if not STATES:
        tokens = tl.where(tl.load(wanted + s) != 0, tokens, 0)
    last = (tl.cdiv(tokens, Q) - 1) * Q

    if HAS_FINAL:
        state = _load_state(grad_final + (s * H + h) * K * V, column, V, K, BK, NK)
    else:
        state = _identity_from(V, column, BK, NK)
    for back in tl.range(0, tokens, Q, num_stages=STAGES):
        at = last - back
        token = begin + at
        index = (c + at // Q) * H + h
        place = index * C
        left = tl.minimum(tokens - at, Q)
        here = step < left * n
        if STATES:
            _store_state(grad_states + index * K * V, state, column, V, K, BK, NK)
        k_tiles = load_tiles(k + (token * n * H + h) * K, step, here, H * K, K, BK, NK)
        q_tiles = load_tiles(q + (token * H + h) * K, t, t < left, H * K, K, BK, NK)
        p_o = grad_o + (token * H + h) * V + t[None, :] * (H * V) + column[:, None]
        g_o = tl.load(p_o, mask=(t < left)[None, :] & (column < V)[:, None], other=0.0)
        U = tl.load(inverse + place * C + step[:, None] * C + step[None, :])
        G = tl.load(decay + place + step)
        P = tl.load(scores + (index * QP + t)[:, None] * C + step[None, :])
        factor = tl.load(reads + index * QP + t)
        r_k = tl.load(units + place + step)
        b = tl.load(beta + (token * n + step) * H + h, mask=here, other=0.0).to(tl.float32)
        G_end = tl.load(decay + place + C - 1)

        by_corrected = read(state, k_tiles, dtype, PARTS, NK) * (exp(G_end - G) * r_k)[None, :]
        by_corrected += product(g_o, P, dtype, PARTS)
        y = by_corrected - product(by_corrected * b[None, :], U, dtype, PARTS)
        if STATES:
            p_y = Y + (token * n * H + h) * V + step[None, :] * (H * V) + column[:, None]
            tl.store(p_y, y.to(Y.dtype.element_ty), mask=here[None, :] & (column < V)[:, None])
        by_read = g_o.to(tl.float32) * factor[None, :]
        by_erased = y * (b * exp(G) * r_k)[None, :]
        new = ()
        for i in tl.static_range(NK):
            adjoint = state[i] * exp(G_end) + product(by_read, q_tiles[i], dtype, PARTS)
            new = new + (adjoint - product(by_erased, k_tiles[i], dtype, PARTS),)
        state = new
    if HAS_INITIAL:
        _store_state(grad_initial + (s * H + h) * K * V, state, column, V, K, BK, NK)
