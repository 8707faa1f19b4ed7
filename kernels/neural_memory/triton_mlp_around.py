"""What of a group of chunks' gradients does not go from chunk to chunk: `triton_mlp_back.py` has the equations.

`before_kernel` gives what the walk back starts from, `after_kernel` takes what it leaves.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.neural_memory.triton_mlp_handed import (
    CURVED,
    ERROR,
    GRAD_ERROR,
    GRAD_HIDDEN,
    GRAD_Z,
    GRAD_Z_Q,
    HIDDEN,
    HIDDEN_Q,
    SLOPE,
    hand_on,
    slot_of,
    take,
)  # fmt: skip
from riverrun.kernels.neural_memory.triton_mlp_tiles import (
    TOKENS,
    activation,
    apart,
    load_column,
    load_gain,
    load_rows,
    load_tile,
    load_tokens,
    locate,
    multiply,
    settle,
    store_rows,
    store_sum,
    store_tokens,
    through_norm,
    unit,
    weigh,
    widen,
)  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def output_gradients_kernel(
    grad_o,  # (B, T, H, V)
    before_norm,  # (B, T, H, V): U_q
    norm_weight,  # (H, V)
    grad_u_q,  # (B, T, H, V)
    by_gain,  # (M, H, C // TOKENS, V) float32
    start, length, T,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, WV: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """∂U_q of all chunks, if there is a norm, and what its gain gets of the outputs."""
    BLOCKS: tl.constexpr = C // TOKENS
    place, token = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * TOKENS
    begin, tokens = chunk(start, length, place // H, T, C, PACKED)
    at, left = ((begin + token) * H + place % H) * V, tokens - token
    x = load_tokens(grad_o + at, left, H * V, V, WV, TOKENS).to(tl.float32)
    n, factor = unit(load_tokens(before_norm + at, left, H * V, V, WV, TOKENS).to(tl.float32), V, WV)
    gain = load_gain(norm_weight, place % H, V, WV, True)
    store_tokens(grad_u_q + at, through_norm(gain * x, n, factor, V, WV), left, H * V, V, WV, TOKENS)
    store_sum(by_gain + tl.program_id(0).to(tl.int64) * V, x * n, 1, V)


@triton.jit(do_not_specialize=["T", "keep", "start"])
def before_kernel(
    q, k,
    reads1, weight1, reads2, weight2,
    kept,  # (S, H, keep, P, F (K + V)), as k: the states before the group's chunks, or before ALL, (M, H, …)
    errors,  # (S, H, keep, C, V), or (M, H, C, V): δ₂
    grad_u_q,  # (B, T, H, V)
    handed,  # (S, H, keep, HANDED, TILES, C, BF), as k
    crossings,  # (S, H, keep, TILES, C, C), as k: −G₂ ∘ H_qᵀ H
    grad_reads1,  # (M, H, TILES, P, C) float32
    grad_reads2,
    cu_seqlens, first, T, keep, start,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """A tile of a chunk of the group that begins with chunk `start`."""
    dtype: tl.constexpr = k.dtype.element_ty
    BLOCK: tl.constexpr = P * F * (K + V)
    tile, number = tl.program_id(0) % TILES, start + tl.program_id(0) // TILES % keep
    program = (tl.program_id(0) // TILES // keep).to(tl.int64)
    begin, left, place = locate(program, number, cu_seqlens, first, T, H, C, PACKED)
    if left > 0:
        h, row, i = place % H, tl.arange(0, C), tile * BF
        lower = row[:, None] * C + row[None, :]
        at_rows, at_grads = place * (P * C), (place * TILES + tile) * (P * C)
        at = slot_of(program, place, number, keep, ALL)
        own = program * keep + number % keep
        kept += at * BLOCK

        x = load_rows(k + (begin * H + h) * K, left, H * K, K, WK, C)
        weights = tl.trans(load_tile(kept, i, K, WK, BF))
        hidden, slope, curvature = activation(multiply(x, weights, dtype), SILU)
        hidden = settle(hidden, dtype)
        hand_on(handed, hidden, own, HIDDEN, tile, C, BF, TILES)
        hand_on(handed, slope, own, SLOPE, tile, C, BF, TILES)
        d2 = load_rows(errors + at * (C * V), C, V, V, WV, C)
        back = multiply(d2, tl.trans(load_tile(kept + F * K, i, V, WV, BF)), dtype)
        d1 = settle(back * slope, dtype)
        hand_on(handed, d1, own, ERROR, tile, C, BF, TILES)
        hand_on(handed, back * curvature, own, CURVED, tile, C, BF, TILES)

        y = load_rows(q + (begin * H + h) * K, left, H * K, K, WK, C)
        products = multiply(y, tl.trans(x), dtype)
        products = settle(products * tl.load(weight1 + place * (C * C) + lower), dtype)
        read = multiply(y, weights, dtype)
        z_q = read * load_column(reads1 + at_rows, C) - multiply(products, d1, dtype)
        read = settle(read, dtype)
        moved = read
        if P == 2:
            share = multiply(y, tl.trans(load_tile(kept + F * (K + V), i, K, WK, BF)), dtype)
            z_q += share * load_column(reads1 + at_rows + C, C)
            moved = settle(share, dtype)
        hidden_q, slope_q, _ = activation(z_q, SILU)
        hidden_q, slope_q = settle(hidden_q, dtype), settle(slope_q, dtype)
        hand_on(handed, hidden_q, own, HIDDEN_Q, tile, C, BF, TILES)

        by_u_q = load_rows(grad_u_q + (begin * H + h) * V, left, H * V, V, WV, C)
        weight = tl.load(weight2 + place * (C * C) + lower)
        crossed = settle(-multiply(by_u_q, tl.trans(d2), dtype) * weight, dtype)
        of_hidden = settle(-multiply(hidden_q, tl.trans(hidden), dtype) * weight, dtype)
        store_rows(crossings + (own * TILES + tile) * (C * C), of_hidden, C, C, C, C, C)
        by_z_q = multiply(crossed, hidden, dtype)
        for j in tl.static_range(P):
            tile2 = load_tile(kept + F * K + j * F * (K + V), i, V, WV, BF)
            share = multiply(by_u_q, tl.trans(tile2), dtype)
            store_sum(grad_reads2 + at_grads + j * C, share * widen(hidden_q), 1, C)
            by_z_q += share * load_column(reads2 + at_rows + j * C, C)
        by_z_q = settle(by_z_q * widen(slope_q), dtype)
        hand_on(handed, by_z_q, own, GRAD_Z_Q, tile, C, BF, TILES)
        for j in tl.static_range(P):
            store_sum(grad_reads1 + at_grads + j * C, widen(moved if j else read) * widen(by_z_q), 1, C)
        by_error, by_hidden = multiply(tl.trans(products), by_z_q, dtype), multiply(tl.trans(crossed), hidden_q, dtype)
        hand_on(handed, -by_error, own, GRAD_ERROR, tile, C, BF, TILES)
        hand_on(handed, by_hidden, own, GRAD_HIDDEN, tile, C, BF, TILES)


@triton.jit
def _end_gradients(by_ends, kept, behind, i, MOMENTUM: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    P: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """A tile's share of the gradients of β_b, f_b and m_b, from W and S, and ∂W' and ∂S', as they were kept."""
    W, by_W = load_tile(kept, i, WIDTH, BW, BF).to(tl.float32), load_tile(behind, i, WIDTH, BW, BF).to(tl.float32)
    tl.store(by_ends, tl.sum(W * by_W))
    if P == 2:
        S = load_tile(kept + MOMENTUM, i, WIDTH, BW, BF).to(tl.float32)
        tl.store(by_ends + 1, tl.sum(S * by_W))
        tl.store(by_ends + 2, tl.sum(S * load_tile(behind + MOMENTUM, i, WIDTH, BW, BF).to(tl.float32)))


@triton.jit(do_not_specialize=["T", "keep", "start"])
def after_kernel(
    q, k,
    reads1, weight1, writes1,
    kept, errors, grad_o, grad_u_q, handed, behind,  # as in `back_kernel`
    grad_v, grad_q, grad_k,
    grad_weight1, grad_weight2,  # (M, H, C, C) float32
    grad_ends1, grad_ends2,  # (M, H, TILES, 1 or 3) float32
    cu_seqlens, first, T, keep, start,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """∂Q, ∂K, ∂G₁, ∂G₂ and those of β_b, f_b and m_b, of a chunk of the group that begins with chunk `start`."""
    dtype: tl.constexpr = k.dtype.element_ty
    MOMENTUM: tl.constexpr = F * (K + V)
    ENDS: tl.constexpr = 1 if P == 1 else 3
    number, program = start + tl.program_id(0) % keep, (tl.program_id(0) // keep).to(tl.int64)
    begin, left, place = locate(program, number, cu_seqlens, first, T, H, C, PACKED)
    if left > 0:
        h, row, once = place % H, tl.arange(0, C), tl.minimum(left, 1)
        lower, at_rows = row[:, None] * C + row[None, :], place * (P * C)
        own = program * keep + number % keep
        slot = slot_of(program, place, number, keep, ALL)
        kept += slot * (P * MOMENTUM)
        behind += own * (P * MOMENTUM)
        at = begin * H + h
        by_q, by_k = tl.zeros([C, WK], tl.float32), tl.zeros([C, WK], tl.float32)
        inner, of_hidden = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        for tile in tl.range(0, TILES, disable_licm=True):
            i, at_ends = tile * BF, (place * TILES + tile) * ENDS
            by_z_q, d1 = take(handed, own, GRAD_Z_Q, tile, C, BF, TILES), take(handed, own, ERROR, tile, C, BF, TILES)
            inner = multiply(by_z_q, tl.trans(d1), dtype, inner)
            hidden = tl.trans(take(handed, own, HIDDEN, tile, C, BF, TILES))
            of_hidden = multiply(take(handed, own, HIDDEN_Q, tile, C, BF, TILES), hidden, dtype, of_hidden)
            by_k = multiply(take(handed, own, GRAD_Z, tile, C, BF, TILES), load_tile(kept, i, K, WK, BF), dtype, by_k)
            for j in tl.static_range(P):
                read = weigh(by_z_q, reads1 + at_rows + j * C, 1.0, C)
                by_q = multiply(read, load_tile(kept + j * MOMENTUM, i, K, WK, BF), dtype, by_q)
                written = weigh(d1, writes1 + at_rows + j * C, -1.0, C)
                by_k = multiply(written, load_tile(behind + j * MOMENTUM, i, K, WK, BF), dtype, by_k)
            _end_gradients(grad_ends1 + at_ends, kept, behind, i, MOMENTUM, K, WK, P, BF)
            _end_gradients(grad_ends2 + at_ends, kept + F * K, behind + F * K, i, MOMENTUM, V, WV, P, BF)
        d2 = load_rows(errors + slot * (C * V), C, V, V, WV, C)
        by_u_q = load_rows(grad_u_q + at * V, left, H * V, V, WV, C)
        by_weight = -apart(by_u_q, tl.trans(d2), dtype, once) * of_hidden
        store_rows(grad_weight2 + place * (C * C), by_weight, C, C, C, C, C)
        x, y = load_rows(k + at * K, left, H * K, K, WK, C), load_rows(q + at * K, left, H * K, K, WK, C)
        by_weight = -apart(y, tl.trans(x), dtype, once) * inner
        store_rows(grad_weight1 + place * (C * C), by_weight, C, C, C, C, C)
        crossed = settle(-inner * tl.load(weight1 + place * (C * C) + lower), dtype)
        by_q = apart(crossed, x, dtype, once, by_q)
        by_k = apart(tl.trans(crossed), y, dtype, once, by_k)
        if RESIDUAL:  # of the outputs, and of the errors, whose other part v is
            by_q += load_rows(grad_o + at * V, left, H * V, V, WV, C).to(tl.float32)
            by_k -= load_rows(grad_v + at * V, left, H * V, V, WV, C).to(tl.float32)
        store_rows(grad_q + at * K, by_q, left, H * K, K, WK, C)
        store_rows(grad_k + at * K, by_k, left, H * K, K, WK, C)
