"""The walk over a sequence's chunks: outputs, or the states at the chunks' starts. A program owns a sequence and head.

With W and S at the chunk's start, all other matrices a column a token (`gates.py` has β, f, G, N and m; ₗ is the layer)

    Z = W₁ᵀ K    H = φ(Z)    U = W₂ᵀ H    δ₂ = ∂ℓ/∂U    δ₁ = (W₂ δ₂) ∘ φ'(Z)
    Z_q = W₁ᵀ Q β₁ + S₁ᵀ Q f₁ − δ₁ (G₁ᵀ ∘ Kᵀ Q)        H_q = φ(Z_q)
    U_q = W₂ᵀ H_q β₂ + S₂ᵀ H_q f₂ − δ₂ (G₂ᵀ ∘ Hᵀ H_q)        O = [Q +] [γ LN](U_q)
    W' = β_b W + f_b S − X diag(G_b) δᵀ        S' = m_b S − X diag(N_b) δᵀ        X = K, H

The state is larger than what is on chip, so it lies in memory, and each layer's part passes through the chip once a
chunk, a tile of hidden channels at a time. Only U needs all of them before anything else can be done. Hence a tile,
once updated, is read for the next chunk at once. What the layers pass to each other, (F, C), goes through memory too,
and what a tile's update needs of the tile is loaded anew: registers are scarcer than the cache is slow. For the same
reason the compiler is not to move out of loops what does not change in them.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import sequence
from riverrun.kernels.neural_memory.triton_mlp_tiles import (
    activation,
    error,
    load_gain,
    load_row,
    load_tile,
    load_tokens,
    multiply,
    store_tile,
    store_tokens,
    unit,
)  # fmt: skip


@triton.jit
def _copy(source, target, size):
    """So many numbers, a multiple of 4; many are on their way at a time."""
    for i in tl.range(0, size, 8192):
        place = i + tl.arange(0, 8192)
        tl.store(target + place, tl.load(source + place, mask=place < size), mask=place < size)


@triton.jit
def _enter(
    source, target, x, tiles, C: tl.constexpr, P: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, SILU: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Copy a state of so many tiles, and read it: → U (BV, C) of keys x (BK, C)."""
    _copy(source, target, tiles * (P * (K + V) * BF))
    u = tl.zeros([BV, C], tl.float32)
    for i in tl.range(0, tiles * BF, BF):
        hidden, _, _ = activation(multiply(load_tile(source, i, K, BK, BF), x, dtype), SILU)
        u = multiply(tl.trans(load_tile(source + K * F, i, V, BV, BF)), hidden, dtype, u)
    tl.debug_barrier()
    return u


@triton.jit
def _learn(
    source, target, i, x, d, ends, writes, MOMENTUM: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, BF: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Write what a chunk and head make of the weights in a layer's tile, from d (BF, C) and x (BW, C), and return it.
    MOMENTUM: how far behind the weights that lies."""
    tile = load_tile(source, i, WIDTH, BW, BF) * tl.load(ends)
    if P == 2:
        tile += load_tile(source + MOMENTUM, i, WIDTH, BW, BF) * tl.load(ends + 1)
    tile -= multiply(d.to(tl.float32) * load_row(writes, C), tl.trans(x), dtype)
    tl.debug_barrier()  # what is written over has been read
    store_tile(target, tile, i, WIDTH, BW, BF)
    return tile


@triton.jit
def _move(
    source, target, i, x, d, ends, writes, MOMENTUM: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, BF: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The same of the momentum."""
    if P == 2:
        tile = load_tile(source + MOMENTUM, i, WIDTH, BW, BF) * tl.load(ends + 2)
        tile -= multiply(d.to(tl.float32) * load_row(writes + C, C), tl.trans(x), dtype)
        tl.debug_barrier()
        store_tile(target + MOMENTUM, tile, i, WIDTH, BW, BF)


@triton.jit
def _first_layer(
    state, target, passed, hidden_next, x, x_q, x_next, d2, scores, reads, ends, writes,
    C: tl.constexpr, P: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BF: tl.constexpr, SILU: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Of one chunk: pass on H, H_q, if SAVE W₂ δ₂, and H of the next chunk (F, C); write W₁' and S₁'."""
    dtype: tl.constexpr = x.dtype
    MOMENTUM: tl.constexpr = F * (K + V)
    for i in tl.range(0, F, BF, disable_licm=True):
        tile = load_tile(state, i, K, BK, BF)
        hidden, slope, _ = activation(multiply(tile, x, dtype), SILU)
        store_tile(passed, hidden.to(dtype), i, C, C, BF)
        z_q = multiply(tile, x_q, dtype) * load_row(reads, C)
        if P == 2:
            z_q += multiply(load_tile(state + MOMENTUM, i, K, BK, BF), x_q, dtype) * load_row(reads + C, C)
        back = multiply(load_tile(state + F * K, i, V, BV, BF), d2, dtype)
        if SAVE:
            store_tile(passed + 2 * F * C, back.to(dtype), i, C, C, BF)
        d1 = (back * slope).to(dtype)
        hidden_q, _, _ = activation(z_q - multiply(d1, scores, dtype), SILU)
        store_tile(passed + F * C, hidden_q.to(dtype), i, C, C, BF)
        tl.debug_barrier()
        tile = _learn(state, target, i, x, d1, ends, writes, MOMENTUM, K, BK, C, P, BF, dtype)
        hidden, _, _ = activation(multiply(tile, x_next, dtype), SILU)
        store_tile(hidden_next, hidden.to(dtype), i, C, C, BF)
        _move(state, target, i, x, d1, ends, writes, MOMENTUM, K, BK, C, P, BF, dtype)
    tl.debug_barrier()


@triton.jit
def _second_layer(
    state, target, passed, hidden_next, d2, reads, ends, writes, C: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    F: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """Of one chunk: → U of the next one (BV, C), and if OUTPUT U_q without its last term, and Hᵀ H_q (C, C); write W₂'
    and S₂'."""
    dtype: tl.constexpr = d2.dtype
    MOMENTUM: tl.constexpr = F * (K + V)
    state += F * K
    target += F * K
    u, u_q, inner = tl.zeros([BV, C], tl.float32), tl.zeros([BV, C], tl.float32), tl.zeros([C, C], tl.float32)
    for i in tl.range(0, F, BF, disable_licm=True):
        if OUTPUT:
            hidden_q = load_tile(passed + F * C, i, C, C, BF)
            tile = load_tile(state, i, V, BV, BF)
            u_q = multiply(tl.trans(tile), hidden_q * load_row(reads, C), dtype, u_q)
            if P == 2:
                tile = load_tile(state + MOMENTUM, i, V, BV, BF)
                u_q = multiply(tl.trans(tile), hidden_q * load_row(reads + C, C), dtype, u_q)
            inner = multiply(tl.trans(load_tile(passed, i, C, C, BF)), hidden_q, dtype, inner)
            tl.debug_barrier()
        hidden = load_tile(passed, i, C, C, BF)
        _learn(state, target, i, d2, hidden, ends, writes, MOMENTUM, V, BV, C, P, BF, dtype)
        _move(state, target, i, d2, hidden, ends, writes, MOMENTUM, V, BV, C, P, BF, dtype)
        tl.debug_barrier()
        tile = load_tile(target, i, V, BV, BF)
        u = multiply(tl.trans(tile), load_tile(hidden_next, i, C, C, BF), dtype, u)
    tl.debug_barrier()
    return u, u_q, inner


@triton.jit(do_not_specialize=["keep"])
def forward_kernel(
    q,  # (B, T, H, K)
    k,
    v,  # (B, T, H, V)
    reads1,  # (M, H, P, C): β, f of the tokens' reads; all gates float32
    weight1,  # (M, H, C, C): G
    ends1,  # (M, H, 1 or 3): β_b, f_b, m_b
    writes1,  # (M, H, P, C): G_b, N_b
    reads2,
    weight2,
    ends2,
    writes2,
    norm_weight,  # (H, V)
    initial,  # (S, H, P, F (K + V)) float32
    o,  # (B, T, H, V)
    before_norm,  # (B, T, H, V): U_q
    state,  # (S, H, P, F (K + V)): lives here, and ends as the final one
    passed,  # (S, H, 3, F, C)
    checkpoints,  # (M // keep, H, P, F (K + V)): the states before every keep-th chunk of a sequence but its first
    cu_seqlens,
    first,
    T,
    keep,
    H: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BF: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    SAVE: tl.constexpr,  # what a backward pass needs: U_q and checkpoints
    PACKED: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    BLOCK: tl.constexpr = (K + V) * F
    ENDS: tl.constexpr = 1 if P == 1 else 3
    s, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    begin, tokens, c = sequence(cu_seqlens, first, s, T, C, PACKED)
    row = tl.arange(0, C)
    state += (s * H + h) * (P * BLOCK)
    initial += (s * H + h) * (P * BLOCK)
    passed += (s * H + h) * (3 * F * C)
    hidden_next = passed + 2 * F * C
    gain = load_gain(norm_weight, h, V, BV, NORM)

    x = load_tokens(k + (begin * H + h) * K, tokens, H * K, K, BK, C)
    u = _enter(initial, state, x, F // BF, C, P, K, F, V, BK, BV, BF, SILU, dtype)
    for at in tl.range(0, tokens, C, disable_licm=True):
        at_key, at_value = ((begin + at) * H + h) * K, ((begin + at) * H + h) * V
        left, index = tokens - at, (c + at // C) * H + h
        p_ends1, p_ends2 = ends1 + index * ENDS, ends2 + index * ENDS
        p_writes1, p_writes2 = writes1 + index * (P * C), writes2 + index * (P * C)
        p_reads1, p_reads2 = reads1 + index * (P * C), reads2 + index * (P * C)
        p_transposed = index * (C * C) + row[None, :] * C + row[:, None]
        x = load_tokens(k + at_key, left, H * K, K, BK, C)
        d2 = error(u, x, load_tokens(v + at_value, left, H * V, V, BV, C), gain, V, BV, NORM, RESIDUAL).to(dtype)
        x_q = load_tokens(q + at_key, left, H * K, K, BK, C)
        x_next = load_tokens(k + at_key + C * H * K, left - C, H * K, K, BK, C)
        scores = (multiply(tl.trans(x), x_q, dtype) * tl.load(weight1 + p_transposed)).to(dtype)
        if SAVE:
            number = at // C + 1  # of the next chunk
            saves = tl.where((number % keep == 0) & (left > C), 1, 0)
            checkpoint = checkpoints + ((c // keep + number // keep - 1) * H + h) * (P * BLOCK)

        _first_layer(
            state, state, passed, hidden_next, x, x_q, x_next, d2, scores, p_reads1, p_ends1, p_writes1,
            C, P, K, F, V, BK, BV, BF, SILU, False,
        )  # fmt: skip
        u, u_q, inner = _second_layer(
            state, state, passed, hidden_next, d2, p_reads2, p_ends2, p_writes2, C, P, K, F, V, BV, BF // 2, True
        )
        if SAVE:
            _copy(state, checkpoint, saves * (P * BLOCK))

        u_q -= multiply(d2, inner * tl.load(weight2 + p_transposed), dtype)
        if NORM:
            if SAVE:
                store_tokens(before_norm + at_value, u_q, left, H * V, V, BV, C)
            n, _ = unit(u_q, V, BV)
            u_q = n * gain
        if RESIDUAL:
            u_q += load_tokens(q + at_key, left, H * K, K, BK, C).to(tl.float32)
        store_tokens(o + at_value, u_q, left, H * V, V, BV, C)


@triton.jit(do_not_specialize=["keep", "group"])
def states_kernel(
    q,
    k,
    v,
    reads1,
    weight1,
    ends1,
    writes1,
    ends2,
    writes2,
    norm_weight,
    source,  # `initial` for group 0, or `checkpoints`
    states,  # (S, keep + 1, H, P, F (K + V)): before the chunks of this group, and after them
    passed,  # (S, keep + 1, H, 3, F, C): H, H_q and W₂ δ₂ of those chunks
    u_of_chunks,  # (S, keep, H, C, V) float32
    cu_seqlens,
    first,
    T,
    keep,
    group,
    H: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BF: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    FROM_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The states before the chunks of one group of every sequence, recomputed from the first of them."""
    dtype: tl.constexpr = k.dtype.element_ty
    BLOCK: tl.constexpr = (K + V) * F
    ENDS: tl.constexpr = 1 if P == 1 else 3
    s, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    begin, tokens, c = sequence(cu_seqlens, first, s, T, C, PACKED)
    row = tl.arange(0, C)
    start = group * keep * C
    end = tl.minimum(tokens, start + keep * C)
    if FROM_INITIAL:
        source += (s * H + h) * (P * BLOCK)
    else:
        source += ((c // keep + group - 1) * H + h) * (P * BLOCK)
    states += (s * (keep + 1) * H + h) * (P * BLOCK)
    passed += (s * (keep + 1) * H + h) * (3 * F * C)
    u_of_chunks += (s * keep * H + h) * (C * V)
    gain = load_gain(norm_weight, h, V, BV, NORM)

    x = load_tokens(k + ((begin + start) * H + h) * K, tokens - start, H * K, K, BK, C)
    tiles = tl.where(start < tokens, F // BF, 0)
    u = _enter(source, states, x, tiles, C, P, K, F, V, BK, BV, BF, SILU, dtype)
    for at in tl.range(start, end, C, disable_licm=True):
        at_key, at_value = ((begin + at) * H + h) * K, ((begin + at) * H + h) * V
        left, index = tokens - at, (c + at // C) * H + h
        p_reads1 = reads1 + index * (P * C)
        p_transposed = index * (C * C) + row[None, :] * C + row[:, None]
        p_ends1, p_ends2 = ends1 + index * ENDS, ends2 + index * ENDS
        p_writes1, p_writes2 = writes1 + index * (P * C), writes2 + index * (P * C)
        following = states + H * (P * BLOCK)
        store_tokens(u_of_chunks, u, left, V, V, BV, C)
        hidden_next = passed + H * (3 * F * C)
        x = load_tokens(k + at_key, left, H * K, K, BK, C)
        x_q = load_tokens(q + at_key, left, H * K, K, BK, C)
        scores = (multiply(tl.trans(x), x_q, dtype) * tl.load(weight1 + p_transposed)).to(dtype)
        x_next = load_tokens(k + at_key + C * H * K, left - C, H * K, K, BK, C)
        d2 = error(u, x, load_tokens(v + at_value, left, H * V, V, BV, C), gain, V, BV, NORM, RESIDUAL).to(dtype)
        _first_layer(
            states, following, passed, hidden_next, x, x_q, x_next, d2, scores, p_reads1, p_ends1, p_writes1,
            C, P, K, F, V, BK, BV, BF, SILU, True,
        )  # fmt: skip
        u, _, _ = _second_layer(
            states, following, passed, hidden_next, d2, p_ends2, p_ends2, p_writes2, C, P, K, F, V, BV, BF // 2, False
        )
        passed = hidden_next
        states = following
        u_of_chunks += H * (C * V)
