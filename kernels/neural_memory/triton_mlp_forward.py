"""The steps over a sequence's chunks: outputs, or, for a backward pass, the states at the chunks' starts; or both at
once, where ALL states are kept.

With W and S at the chunk's start, all other matrices a column a token (`gates.py` has β, f, G, N and m; ₗ is the layer)

    Z = W₁ᵀ K    H = φ(Z)    U = W₂ᵀ H    δ₂ = ∂ℓ/∂U    δ₁ = (W₂ δ₂) ∘ φ'(Z)
    Z_q = W₁ᵀ Q β₁ + S₁ᵀ Q f₁ − δ₁ (G₁ᵀ ∘ Kᵀ Q)        H_q = φ(Z_q)
    U_q = W₂ᵀ H_q β₂ + S₂ᵀ H_q f₂ − δ₂ (G₂ᵀ ∘ Hᵀ H_q)        O = [Q +] [γ LN](U_q)
    W' = β_b W + f_b S − X diag(G_b) δᵀ        S' = m_b S − X diag(N_b) δᵀ        X = K, H

The state is larger than what is on chip, so it lies in memory and passes through the chip once a chunk. The more of it
is on its way at a time the better: a program has one tile of hidden channels of one sequence and head. Only U and U_q
need all of them. Hence a chunk is two launches: `error_kernel` sums U and makes δ₂ of it; `step_kernel` does all else,
reads the updated tile for the next chunk at once, and leaves shares of U_q, which the next `error_kernel` sums.
"""

import triton
import triton.language as tl

from riverrun.kernels.neural_memory.triton_mlp_tiles import (
    TOKENS,
    activation,
    apply,
    error,
    load_gain,
    load_row,
    load_sum,
    load_tile,
    load_tokens,
    locate,
    multiply,
    scores,
    settle,
    slot_of,
    store_tile,
    store_tokens,
    unit,
    weigh,
)  # fmt: skip


@triton.jit
def _before(checkpoints, state, program, place, number, keep, H: tl.constexpr, BLOCK: tl.constexpr):
    """Where the state before a chunk lies: in `checkpoints` before every keep-th of a sequence but its first."""
    p = state + program * BLOCK
    if (number % keep == 0) & (number > 0):
        first = place // H - number
        p = checkpoints + ((first // keep + number // keep - 1) * H + place % H) * BLOCK
    return p


@triton.jit(do_not_specialize=["T", "keep", "number"])
def enter_kernel(
    k,
    checkpoints,
    state,
    partial_u,
    cu_seqlens, first, T, keep, number,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The shares of U of a chunk whose state no step has made."""
    dtype: tl.constexpr = k.dtype.element_ty
    program, tile = (tl.program_id(0) // (F // BF)).to(tl.int64), tl.program_id(0) % (F // BF)
    begin, left, place = locate(program, number, cu_seqlens, first, T, H, C, PACKED)
    if left > 0:
        source = _before(checkpoints, state, program, place, number, keep, H, P * F * (K + V))
        key = k + (begin * H + place % H) * K
        hidden, _, _ = activation(apply(source, tile * BF, key, left, H * K, K, BK, C, BF, dtype), SILU)
        for at in tl.range(0, V, BV, disable_licm=True):
            u = multiply(tl.trans(load_tile(source + F * K, tile * BF, at, V, BV, BF)), hidden, dtype)
            store_tokens(partial_u + (program * (F // BF) + tile) * (C * V) + at, u, C, V, V - at, BV, C)


@triton.jit(do_not_specialize=["T", "keep", "number"])
def error_kernel(
    q,  # (B, T, H, K)
    k,
    v,  # (B, T, H, V)
    norm_weight,  # (H, V)
    partial_u,  # (S, H, F // BF, C, V) float32
    partial_u_q,
    o,  # (B, T, H, V)
    before_norm,  # (B, T, H, V): U_q
    u,  # (S, H, keep, C, V), of ALL chunks (M, H, C, V), float32
    errors,  # (S, H, 1 or keep, C, V), of ALL chunks (M, H, C, V): δ₂
    cu_seqlens, first, T, keep, number,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, ALL: tl.constexpr,
    SAVE: tl.constexpr,  # U_q, for a backward pass
    AGAIN: tl.constexpr,  # for a backward pass: U and δ₂ of a group of chunks, and no outputs
):  # fmt: skip
    """δ₂ of a chunk, and the outputs of the one before."""
    BLOCKS: tl.constexpr = C // TOKENS
    program, token = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * TOKENS
    gain = load_gain(norm_weight, program % H, V, WV, NORM)
    at_partial = program * (F // BF * C * V) + token * V
    if not AGAIN:
        begin, left, place = locate(program, number - 1, cu_seqlens, first, T, H, C, PACKED)
        if (number > 0) & (left > 0):
            at, left = (begin + token) * H + place % H, left - token
            y = load_sum(partial_u_q + at_partial, C * V, V, WV, F // BF)
            if NORM:
                if SAVE:
                    store_tokens(before_norm + at * V, y, left, H * V, V, WV, TOKENS)
                n, _ = unit(y, V, WV)
                y = n * gain
            if RESIDUAL:
                y += load_tokens(q + at * K, left, H * K, K, WK, TOKENS).to(tl.float32)
            store_tokens(o + at * V, y, left, H * V, V, WV, TOKENS)
    begin, left, place = locate(program, number, cu_seqlens, first, T, H, C, PACKED)
    if left > 0:
        at, left = (begin + token) * H + place % H, left - token
        x = load_tokens(k + at * K, left, H * K, K, WK, TOKENS)
        y = load_tokens(v + at * V, left, H * V, V, WV, TOKENS)
        whole = load_sum(partial_u + at_partial, C * V, V, WV, F // BF)
        slot = program
        if AGAIN or ALL:
            slot = slot_of(program, place, number, keep, ALL)
            store_tokens(u + (slot * C + token) * V, whole, TOKENS, V, V, WV, TOKENS)
        d2 = error(whole, x, y, gain, V, WV, NORM, RESIDUAL)
        store_tokens(errors + (slot * C + token) * V, d2, TOKENS, V, V, WV, TOKENS)


@triton.jit
def _learn(
    source, target, kept, i, at, x, written, pushed, ends, MOMENTUM: tl.constexpr, WIDTH: tl.constexpr,
    BW: tl.constexpr, P: tl.constexpr, BF: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write what a chunk makes of columns of a layer's tile, from x (BW, C), and return its weights. MOMENTUM: how far
    behind the weights that lies. KEPT: write what was there to `kept`."""
    tile = load_tile(source, i, at, WIDTH, BW, BF)
    if KEPT:
        store_tile(kept, tile, i, at, WIDTH, BW, BF)
    tile *= tl.load(ends)
    if P == 2:
        moved = load_tile(source + MOMENTUM, i, at, WIDTH, BW, BF)
        if KEPT:
            store_tile(kept + MOMENTUM, moved, i, at, WIDTH, BW, BF)
        tile += moved * tl.load(ends + 1)
        moved = multiply(pushed, tl.trans(x), x.dtype, moved * tl.load(ends + 2))
        tl.debug_barrier()  # what is written over has been read
        store_tile(target + MOMENTUM, moved, i, at, WIDTH, BW, BF)
    tile = multiply(written, tl.trans(x), x.dtype, tile)
    tl.debug_barrier()
    store_tile(target, tile, i, at, WIDTH, BW, BF)
    return tile


@triton.jit(do_not_specialize=["T", "keep", "number"])
def step_kernel(
    q,
    k,
    reads1,  # (M, H, P, C): β, f of the tokens' reads; all gates float32
    weight1,  # (M, H, C, C): G
    ends1,  # (M, H, 1 or 3): β_b, f_b, m_b
    writes1,  # (M, H, P, C): G_b, N_b
    reads2,
    weight2,
    ends2,
    writes2,
    errors,  # δ₂
    checkpoints,  # (M // keep, H, P, F (K + V)): the states before every keep-th chunk of a sequence but its first
    state,  # (S, H, P, F (K + V)) float32: all others
    kept,  # (S, H, keep, P, F (K + V)): those before a group's chunks, or ALL, (M, H, P, F (K + V)), in the type of k
    partial_u,  # (S, H, F // BF, C, V) float32
    partial_u_q,
    cu_seqlens, first, T, keep, number,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, ALL: tl.constexpr,
    AGAIN: tl.constexpr,  # for a backward pass: no U_q, but what is `kept`, and all states but the first in `state`
):  # fmt: skip
    """The shares of U_q, the state after a chunk, and its shares of the next one's U."""
    dtype: tl.constexpr = k.dtype.element_ty
    BLOCK: tl.constexpr = P * F * (K + V)
    MOMENTUM: tl.constexpr = F * (K + V)
    TILES: tl.constexpr = F // BF
    ENDS: tl.constexpr = 1 if P == 1 else 3
    KEPT: tl.constexpr = AGAIN or ALL
    program, i = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BF
    begin, left, place = locate(program, number, cu_seqlens, first, T, H, C, PACKED)
    if left > 0:
        source, target = _before(checkpoints, state, program, place, number, keep, H, BLOCK), state + program * BLOCK
        slot = program
        if KEPT:
            slot = slot_of(program, place, number, keep, ALL)
            kept += slot * BLOCK
        elif left > C:
            target = _before(checkpoints, state, program, place + H, number + 1, keep, H, BLOCK)
        key, query = k + (begin * H + place % H) * K, q + (begin * H + place % H) * K
        error, row = errors + slot * (C * V), tl.arange(0, C)
        at_partial = (program * TILES + i // BF) * (C * V)
        p_reads1, p_writes1 = reads1 + place * (P * C), writes1 + place * (P * C)
        p_reads2, p_writes2 = reads2 + place * (P * C), writes2 + place * (P * C)

        back = apply(source + F * K, i, error, C, V, V, BV, C, BF, dtype)
        hidden, slope, _ = activation(apply(source, i, key, left, H * K, K, BK, C, BF, dtype), SILU)
        hidden, d1 = settle(hidden, dtype), settle(back * slope, dtype)
        if not AGAIN:
            transposed = row[None, :] * C + row[:, None]
            products = scores(key, query, left, H * K, H * K, K, BK, C)
            z_q = -multiply(d1, products * tl.load(weight1 + place * (C * C) + transposed), dtype)
            for j in tl.static_range(P):
                share = apply(source + j * MOMENTUM, i, query, left, H * K, K, BK, C, BF, dtype)
                z_q += share * load_row(p_reads1 + j * C, C)
            hidden_q, _, _ = activation(z_q, SILU)
            hidden_q = settle(hidden_q, dtype)
            products = multiply(tl.trans(hidden), hidden_q, dtype)
            products = settle(products * tl.load(weight2 + place * (C * C) + transposed), dtype)
            read, moved = weigh(hidden_q, p_reads2, 1.0, P, C)

        written, pushed = weigh(d1, p_writes1, -1.0, P, C)
        z = tl.zeros([BF, C], tl.float32)
        for at in tl.range(0, K, BK, disable_licm=True):
            x = load_tokens(key + at, left, H * K, K - at, BK, C)
            tile = _learn(
                source, target, kept, i, at, x, written, pushed, ends1 + place * ENDS, MOMENTUM, K, BK, P, BF, KEPT
            )
            z = multiply(tile, load_tokens(key + C * H * K + at, left - C, H * K, K - at, BK, C), dtype, z)
        hidden_next, _, _ = activation(z, SILU)
        hidden_next = settle(hidden_next, dtype)
        written, pushed = weigh(hidden, p_writes2, -1.0, P, C)
        for at in tl.range(0, V, BV, disable_licm=True):
            d2 = load_tokens(error + at, C, V, V - at, BV, C)
            if not AGAIN:
                u_q = -multiply(d2, products, dtype)
                u_q = multiply(tl.trans(load_tile(source + F * K, i, at, V, BV, BF)), read, dtype, u_q)
                if P == 2:
                    u_q = multiply(tl.trans(load_tile(source + MOMENTUM + F * K, i, at, V, BV, BF)), moved, dtype, u_q)
                store_tokens(partial_u_q + at_partial + at, u_q, C, V, V - at, BV, C)
            tile = _learn(
                source + F * K, target + F * K, kept + F * K, i, at, d2, written, pushed, ends2 + place * ENDS,
                MOMENTUM, V, BV, P, BF, KEPT,
            )  # fmt: skip
            u = multiply(tl.trans(tile), hidden_next, dtype)
            store_tokens(partial_u + at_partial + at, u, C, V, V - at, BV, C)
