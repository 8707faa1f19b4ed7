"""The walk over a sequence's chunks: outputs, and what a backward pass needs.

With W and S at the chunk's start, all other matrices a column a token (`gates.py` has β, f, G, N and m; ₗ is the layer)

    Z = W₁ᵀ K    H = φ(Z)    U = W₂ᵀ H    δ₂ = ∂ℓ/∂U    δ₁ = (W₂ δ₂) ∘ φ'(Z)
    Z_q = W₁ᵀ Q β₁ + S₁ᵀ Q f₁ − δ₁ (G₁ᵀ ∘ Kᵀ Q)        H_q = φ(Z_q)
    U_q = W₂ᵀ H_q β₂ + S₂ᵀ H_q f₂ − δ₂ (G₂ᵀ ∘ Hᵀ H_q)        O = [Q +] [γ LN](U_q)
    W' = β_b W + f_b S − X diag(G_b) δᵀ        S' = m_b S − X diag(N_b) δᵀ        X = K, H

A head's weights and momentum are larger than what a multiprocessor holds, and far larger than what a chunk brings. So
a team of programs shares them, a tile of hidden channels each, which stays in registers from the first chunk to the
last. Only U and U_q need all of them: each program writes its share, the team meets, each sums those of a few tokens
and makes δ₂ of them, and the team meets again.
"""

import triton
import triton.language as tl

from riverrun.kernels.neural_memory.triton_mlp_meet import arrive, wait
from riverrun.kernels.neural_memory.triton_mlp_tiles import (
    activation,
    afresh,
    apart,
    error,
    load_column,
    load_gain,
    load_rows,
    load_state,
    load_sum,
    load_tokens,
    locate,
    multiply,
    settle,
    store_rows,
    store_state,
    store_tokens,
    unit,
    widen,
)  # fmt: skip


@triton.jit
def _learn(W, S, x, d, writes, ends, P: tl.constexpr, C: tl.constexpr):
    """W' and S' of a layer's tiles, from x and d whose tokens are columns and rows."""
    keep = tl.load(ends)
    written = settle(-widen(d) * load_column(writes, C), d.dtype)
    if P == 2:
        pushed = settle(-widen(d) * load_column(writes + C, C), d.dtype)
        W = multiply(x, written, d.dtype, W * keep + S * tl.load(ends + 1))
        S = multiply(x, pushed, d.dtype, S * tl.load(ends + 2))
    else:
        W = multiply(x, written, d.dtype, W * keep)
    return W, S


@triton.jit
def _write_outputs(
    q, partial_u_q, o, before_norm, gain, begin, left, token, h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Of tokens `token` … of the chunk that begins at `begin`."""
    at, left = (begin + token) * H + h, left - token
    y = load_sum(partial_u_q + token * V, C * V, V, WV, TILES, SHARE)
    if NORM:
        if SAVE:
            store_tokens(before_norm + at * V, y, left, H * V, V, WV, SHARE)
        n, _ = unit(y, V, WV)
        y = n * gain
    if RESIDUAL:
        y += load_tokens(q + at * K, left, H * K, K, WK, SHARE).to(tl.float32)
    store_tokens(o + at * V, y, left, H * V, V, WV, SHARE)


@triton.jit
def walk_chunk(
    W1, S1, W2, S2,  # the state's tiles (WK, BF) and (BF, WV), float32
    met,  # arrivals so far
    counter,
    q, k, v,
    gain,
    reads1, weight1, ends1, writes1, reads2, weight2, ends2, writes2,
    u, errors,  # (C, V), of this chunk
    partial_u,  # (TILES, C, V), of this team
    partial_u_q,  # (2, TILES, C, V): of chunks of even and odd numbers, for some read one while others write the next
    o, before_norm,
    begin, left, place, number, tile,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr,
    TILES: tl.constexpr, SHARE: tl.constexpr,
    SAVE: tl.constexpr,  # U_q, for a backward pass
    SAVE_U: tl.constexpr,  # U, for one that does not make it again
    READ: tl.constexpr,  # U_q and outputs
):  # fmt: skip
    """The state after a chunk of the head at `place` (m · H + h), and the outputs of the chunk before."""
    dtype: tl.constexpr = k.dtype.element_ty
    ENDS: tl.constexpr = 1 if P == 1 else 3
    h, row, token, once = place % H, tl.arange(0, C), tile * SHARE, tl.minimum(left, 1)
    lower = row[:, None] * C + row[None, :]
    x = load_rows(k + (begin * H + h) * K, left, H * K, K, WK, C)
    hidden, slope, _ = activation(apart(x, W1, dtype, once), SILU)
    hidden, slope = settle(hidden, dtype), settle(slope, dtype)
    share = multiply(hidden, W2, dtype)
    store_rows(partial_u + tile * (C * V), share, C, V, V, WV, C)
    arrive(counter)
    met += TILES
    if READ:  # of what is known while others arrive
        y = load_rows(q + (begin * H + h) * K, left, H * K, K, WK, C)
        products = apart(y, tl.trans(x), dtype, once)
        products = settle(products * tl.load(weight1 + place * (C * C) + lower), dtype)
        z_q = apart(y, W1, dtype, once) * load_column(reads1 + place * (P * C), C)
        if P == 2:
            z_q += apart(y, S1, dtype, once) * load_column(reads1 + place * (P * C) + C, C)
    wait(counter, met)
    if token < C:
        at = (begin + token) * H + h
        whole = load_sum(partial_u + token * V, C * V, V, WV, TILES, SHARE)
        if SAVE_U:
            store_tokens(u + token * V, whole, SHARE, V, V, WV, SHARE)
        mine = load_tokens(k + at * K, left - token, H * K, K, WK, SHARE)
        wanted = load_tokens(v + at * V, left - token, H * V, V, WV, SHARE)
        d2 = error(whole, mine, wanted, gain, V, WV, NORM, RESIDUAL)
        store_tokens(errors + token * V, d2, SHARE, V, V, WV, SHARE)
    arrive(counter)
    met += TILES
    if READ:
        if (number > 0) & (token < C):
            before = (number + 1) % 2 * (TILES * C * V)
            _write_outputs(
                q, partial_u_q + before, o, before_norm, gain, begin - C, C, token, h, H, K, V, C, WK, WV, NORM,
                RESIDUAL, TILES, SHARE, SAVE,
            )  # fmt: skip
    wait(counter, met)

    d2 = load_rows(errors, C, V, V, WV, C)
    d1 = settle(apart(d2, tl.trans(W2.to(dtype)), dtype, once) * widen(slope), dtype)
    if READ:
        z_q -= apart(products, d1, dtype, once)
        hidden_q, _, _ = activation(z_q, SILU)
        hidden_q = settle(hidden_q, dtype)
    W1, S1 = _learn(W1, S1, tl.trans(x), d1, writes1 + place * (P * C), ends1 + place * ENDS, P, C)
    if READ:
        products = apart(hidden_q, tl.trans(hidden), dtype, once)
        products = settle(-products * tl.load(weight2 + place * (C * C) + lower), dtype)
        share = apart(products, d2, dtype, once)
        read = settle(widen(hidden_q) * load_column(reads2 + place * (P * C), C), dtype)
        share = apart(read, W2, dtype, once, share)
        if P == 2:
            read = settle(widen(hidden_q) * load_column(reads2 + place * (P * C) + C, C), dtype)
            share = apart(read, S2, dtype, once, share)
        store_rows(partial_u_q + (number % 2 * TILES + tile) * (C * V), share, C, V, V, WV, C)
    W2, S2 = _learn(W2, S2, tl.trans(hidden), d2, writes2 + place * (P * C), ends2 + place * ENDS, P, C)
    return W1, S1, W2, S2, met


@triton.jit(do_not_specialize=["T", "keep", "heads"])
def walk_kernel(
    q,  # (B, T, H, K)
    k,
    v,  # (B, T, H, V)
    norm_weight,  # (H, V)
    reads1,  # (M, H, P, C): β, f of the tokens' reads; all gates float32
    weight1,  # (M, H, C, C): G
    ends1,  # (M, H, 1 or 3): β_b, f_b, m_b
    writes1,  # (M, H, P, C): G_b, N_b
    reads2,
    weight2,
    ends2,
    writes2,
    initial,  # (S, H, P, F (K + V)) float32
    final,
    o,  # (B, T, H, V)
    before_norm,  # (B, T, H, V): U_q
    states,  # (·, H, P, F (K + V)): those before groups of chunks, float32; or before ALL chunks (M, …), as k
    u,  # (M, H, C, V) float32, of ALL chunks
    errors,  # (M, H, C, V) as k, of ALL chunks: δ₂; or of the team's chunk, (teams, C, V)
    partial_u,  # (teams, TILES, C, V) float32
    partial_u_q,  # (teams, 2, TILES, C, V)
    counters,  # (teams,) int32, zeros
    cu_seqlens, first, T, keep, heads,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr, ALL: tl.constexpr,
    SAVE: tl.constexpr,  # for a backward pass: U_q, and states
):  # fmt: skip
    BLOCK: tl.constexpr = P * F * (K + V)
    tile, team = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    counter, met, token = counters + team, 0, tile * SHARE
    for head in tl.range(team, heads, tl.num_programs(0) // TILES, disable_licm=True):
        program = tl.cast(head, tl.int64)
        gain = load_gain(norm_weight, program % H, V, WV, NORM)
        begin, left, place = locate(program, 0, cu_seqlens, first, T, H, C, PACKED)
        first_place = place // H
        W1, S1, W2, S2 = load_state(initial + program * BLOCK, tile * BF, K, F, V, P, WK, WV, BF)
        for number in tl.range(0, tl.cdiv(left, C), disable_licm=True):
            tile = afresh(tile)
            slot = tl.cast(afresh(team), tl.int64)
            scratch = slot * (TILES * C * V)
            if ALL:
                slot = place
                store_state(states + place * BLOCK, W1, S1, W2, S2, tile * BF, K, F, V, P, WK, WV, BF)
            elif SAVE:
                if (number % keep == 0) & (number > 0):
                    at = (first_place // keep + number // keep - 1) * H + place % H
                    store_state(states + at * BLOCK, W1, S1, W2, S2, tile * BF, K, F, V, P, WK, WV, BF)
            W1, S1, W2, S2, met = walk_chunk(
                W1, S1, W2, S2, met, counter, q, k, v, gain, reads1, weight1, ends1, writes1, reads2, weight2, ends2,
                writes2, u + slot * (C * V), errors + slot * (C * V), partial_u + scratch, partial_u_q + 2 * scratch, o,
                before_norm, begin, left, place, number, tile, H, K, V, C, P, WK, WV, NORM, RESIDUAL, SILU, TILES,
                SHARE, SAVE, ALL, True,
            )  # fmt: skip
            begin, left, place = begin + C, left - C, place + H
        store_state(final + program * BLOCK, W1, S1, W2, S2, tile * BF, K, F, V, P, WK, WV, BF)
        arrive(counter)
        met += TILES
        wait(counter, met)
        if (place // H > first_place) & (token < C):
            last = tl.cast(team, tl.int64) * 2 + (place // H - first_place + 1) % 2
            _write_outputs(
                q, partial_u_q + last * (TILES * C * V), o, before_norm, gain, begin - C, left + C, token, program % H,
                H, K, V, C, WK, WV, NORM, RESIDUAL, TILES, SHARE, SAVE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T", "keep", "heads", "start"])
def again_kernel(
    k, v, norm_weight, weight1, ends1, writes1, ends2, writes2, initial,
    checkpoints,  # (·, H, P, F (K + V)) float32
    kept,  # (S, H, keep, P, F (K + V)), as k: the states before the group's chunks
    u,  # (S, H, keep, C, V) float32
    errors,  # (S, H, keep, C, V), as k: δ₂
    partial_u, counters,
    cu_seqlens, first, T, keep, heads, start,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """For a backward pass: what the group that begins with chunk `start` made."""
    BLOCK: tl.constexpr = P * F * (K + V)
    tile, team = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    counter, met = counters + team, 0
    for head in tl.range(team, heads, tl.num_programs(0) // TILES, disable_licm=True):
        program = tl.cast(head, tl.int64)
        gain = load_gain(norm_weight, program % H, V, WV, NORM)
        begin, left, place = locate(program, start, cu_seqlens, first, T, H, C, PACKED)
        if left > 0:
            source = initial + program * BLOCK
            if start > 0:
                number = place // H - start  # the sequence's first chunk
                source = checkpoints + ((number // keep + start // keep - 1) * H + place % H) * BLOCK
            W1, S1, W2, S2 = load_state(source, tile * BF, K, F, V, P, WK, WV, BF)
            for number in tl.range(0, tl.minimum(tl.cdiv(left, C), keep), disable_licm=True):
                tile, slot = afresh(tile), program * keep + number
                scratch = tl.cast(afresh(team), tl.int64) * (TILES * C * V)
                store_state(kept + slot * BLOCK, W1, S1, W2, S2, tile * BF, K, F, V, P, WK, WV, BF)
                W1, S1, W2, S2, met = walk_chunk(
                    W1, S1, W2, S2, met, counter, k, k, v, gain, weight1, weight1, ends1, writes1, weight1, weight1,
                    ends2, writes2, u + slot * (C * V), errors + slot * (C * V), partial_u + scratch, partial_u, v, v,
                    begin, left, place, number, tile, H, K, V, C, P, WK, WV, NORM, RESIDUAL, SILU, TILES, SHARE, False,
                    True, False,
                )  # fmt: skip
                begin, left, place = begin + C, left - C, place + H
