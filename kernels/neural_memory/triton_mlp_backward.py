"""The steps back over a sequence's chunks.

With the names of `triton_mlp_forward.py`, ∂X the gradient of X, W and S the weights and momentum before the chunk, and
∂W' and ∂S' what comes from behind it, layer ₂ gives

    ∂H_q = W₂ ∂U_q β₂ + S₂ ∂U_q f₂ + H X        ∂H = H_q Xᵀ − ∂W₂' δ₂ diag(G₂b) − ∂S₂' δ₂ diag(N₂b)
    ∂δ₂ = −∂W₂'ᵀ H diag(G₂b) − ∂S₂'ᵀ H diag(N₂b) − ∂U_q (G₂ ∘ H_qᵀ H)        X = −G₂ᵀ ∘ δ₂ᵀ ∂U_q

then layer ₁, with B = W₂ δ₂,

    ∂Z_q = ∂H_q ∘ φ'(Z_q)        ∂δ₁ = −∂Z_q (G₁ ∘ Qᵀ K) − ∂W₁'ᵀ K diag(G₁b) − ∂S₁'ᵀ K diag(N₁b)
    ∂B = ∂δ₁ ∘ φ'(Z)        ∂Z = ∂H ∘ φ'(Z) + ∂δ₁ ∘ B ∘ φ''(Z)        ∂δ₂ += W₂ᵀ ∂B

This is `reads_kernel`, with a program for each tile of hidden channels: only ∂δ₂ needs all of them. Now
`error_gradients_kernel` sums ∂δ₂, and from it follows ∂U, for δ₂ is a function of U. `update_kernel` goes on with

    ∂Z += (W₂ ∂U) ∘ φ'(Z)
    ∂W₂ = β₂b ∂W₂' + H_q diag(β₂) ∂U_qᵀ + H ∂Uᵀ + ∂B δ₂ᵀ        ∂S₂ = f₂b ∂W₂' + m₂ ∂S₂' + H_q diag(f₂) ∂U_qᵀ
    ∂W₁ᵀ = β₁b ∂W₁'ᵀ + ∂Z_q diag(β₁) Qᵀ + ∂Z Kᵀ        ∂S₁ᵀ = f₁b ∂W₁'ᵀ + m₁ ∂S₁'ᵀ + ∂Z_q diag(f₁) Qᵀ
    ∂Q = W₁ ∂Z_q β₁ + S₁ ∂Z_q f₁ + K Y        ∂K = W₁ ∂Z − ∂W₁' δ₁ diag(G₁b) − ∂S₁' δ₁ diag(N₁b) + Q Yᵀ
    Y = −G₁ᵀ ∘ δ₁ᵀ ∂Z_q

and the next `error_gradients_kernel`, of the chunk before, sums ∂Q and ∂K. Matrices (F, C) that are passed on lie in
memory, in this order: H, H_q, ∂B, φ'(Z), δ₁, ∂Z_q and ∂Z, where B ∘ φ''(Z) is at first.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.neural_memory.triton_mlp_tiles import (
    TOKENS,
    activation,
    apply,
    error_gradients,
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
    through_norm,
    unit,
    weigh,
)  # fmt: skip


@triton.jit
def _store_sum(p, x, axis: tl.constexpr, SIZE: tl.constexpr, more):
    """The sums of x over an axis, of which SIZE are there; `more`: to be added to what is there."""
    at = tl.arange(0, x.shape[1 - axis])
    before = tl.load(p + at, mask=(at < SIZE) & more, other=0.0)
    tl.store(p + at, before + tl.sum(x, axis), mask=at < SIZE)


@triton.jit(do_not_specialize=["T"])
def output_gradients_kernel(
    grad_o,  # (B, T, H, V)
    before_norm,  # (B, T, H, V): U_q
    norm_weight,  # (H, V)
    grad_u_q,  # (B, T, H, V)
    by_gain,  # (M, H, C // TOKENS, V) float32: share of the outputs
    start, length, T,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, WV: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """∂U_q of all chunks, if there is a norm."""
    BLOCKS: tl.constexpr = C // TOKENS
    place, token = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * TOKENS
    begin, tokens = chunk(start, length, place // H, T, C, PACKED)
    at, left = ((begin + token) * H + place % H) * V, tokens - token
    x = load_tokens(grad_o + at, left, H * V, V, WV, TOKENS).to(tl.float32)
    n, factor = unit(load_tokens(before_norm + at, left, H * V, V, WV, TOKENS).to(tl.float32), V, WV)
    gain = load_gain(norm_weight, place % H, V, WV, True)
    store_tokens(grad_u_q + at, through_norm(gain * x, n, factor, V, WV), left, H * V, V, WV, TOKENS)
    _store_sum(by_gain + tl.program_id(0).to(tl.int64) * V, x * n, 1, V, False)


@triton.jit(do_not_specialize=["T", "keep", "number"])
def reads_kernel(
    q,
    k,
    reads1, weight1, writes1, reads2, weight2, writes2,  # all gates as in `step_kernel`
    kept,  # (S, H, keep, P, F (K + V)): the states before the group's chunks, or ALL, (M, H, …), in the type of k
    errors,  # (S, H, keep, C, V) or (M, H, C, V): δ₂
    grad_u_q,  # (B, T, H, V)
    adjoint,  # (S, H, P, F (K + V)) float32: ∂W', ∂S'
    passed,  # (S, H, 7, F, C)
    partial_d2,  # (S, H, F // BF, C, V) float32
    partial_weight2,  # (S, H, F // BF, C, C) float32: ∂G₂
    grad_reads2,  # (M, H, F // BF, P, C) float32
    grad_writes1,
    grad_writes2,
    cu_seqlens, first, T, keep, number,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = k.dtype.element_ty
    MOMENTUM: tl.constexpr = F * (K + V)
    TILES: tl.constexpr = F // BF
    program, i = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BF
    begin, left, place = locate(program, number, cu_seqlens, first, T, H, C, PACKED)
    if left > 0:
        token, row = begin * H + place % H, tl.arange(0, C)
        key, query, by_u_q = k + token * K, q + token * K, grad_u_q + token * V
        transposed = row[None, :] * C + row[:, None]
        slot, at_rows = slot_of(program, place, number, keep, ALL), place * (P * C)
        at_tile, at_grads = program * TILES + i // BF, (place * TILES + i // BF) * (P * C)
        kept += slot * (P * MOMENTUM)
        adjoint += program * (P * MOMENTUM)
        passed += program * (7 * F * C)
        error = errors + slot * (C * V)

        hidden, slope, curvature = activation(apply(kept, i, key, left, H * K, K, BK, C, BF, dtype), SILU)
        hidden, slope, curvature = settle(hidden, dtype), settle(slope, tl.float32), settle(curvature, tl.float32)
        store_tile(passed, hidden, i, 0, C, C, BF)
        store_tile(passed + 3 * F * C, slope, i, 0, C, C, BF)
        back = apply(kept + F * K, i, error, C, V, V, BV, C, BF, dtype)
        d1 = settle(back * slope, dtype)
        store_tile(passed + 4 * F * C, d1, i, 0, C, C, BF)
        store_tile(passed + 6 * F * C, back * curvature, i, 0, C, C, BF)

        products = scores(key, query, left, H * K, H * K, K, BK, C)
        products = settle(products * tl.load(weight1 + place * (C * C) + transposed), dtype)
        z_q = -multiply(d1, products, dtype)
        for j in tl.static_range(P):
            read = apply(kept + j * MOMENTUM, i, query, left, H * K, K, BK, C, BF, dtype)
            z_q += read * load_row(reads1 + at_rows + j * C, C)
        hidden_q, slope_q, _ = activation(z_q, SILU)
        hidden_q, slope_q = settle(hidden_q, dtype), settle(slope_q, dtype)
        store_tile(passed + F * C, hidden_q, i, 0, C, C, BF)

        inner, of_hidden = -scores(error, by_u_q, left, V, H * V, V, BV, C), multiply(tl.trans(hidden), hidden_q, dtype)
        tl.store(partial_weight2 + at_tile * (C * C) + transposed, inner * of_hidden)
        weight = tl.load(weight2 + place * (C * C) + transposed)
        crossed, of_hidden = settle(inner * weight, dtype), settle(of_hidden * weight, dtype)
        by_hidden_q = multiply(hidden, crossed, dtype)
        for j in tl.static_range(P):
            share = apply(kept + j * MOMENTUM + F * K, i, by_u_q, left, H * V, V, BV, C, BF, dtype)
            _store_sum(grad_reads2 + at_grads + j * C, share * hidden_q.to(tl.float32), 0, C, False)
            by_hidden_q += share * load_row(reads2 + at_rows + j * C, C)
        by_z_q = settle(by_hidden_q * slope_q.to(tl.float32), dtype)
        store_tile(passed + 5 * F * C, by_z_q, i, 0, C, C, BF)
        tl.debug_barrier()  # what was passed on is loaded again: registers are scarcer than the cache is slow

        by_d1, d1 = -multiply(by_z_q, tl.trans(products), dtype), load_tile(passed + 4 * F * C, i, 0, C, C, BF)
        for j in tl.static_range(P):
            share = -apply(adjoint + j * MOMENTUM, i, key, left, H * K, K, BK, C, BF, dtype)
            _store_sum(grad_writes1 + at_grads + j * C, share * d1.to(tl.float32), 0, C, False)
            by_d1 += share * load_row(writes1 + at_rows + j * C, C)
        by_z = settle(by_d1 * load_tile(passed + 6 * F * C, i, 0, C, C, BF).to(tl.float32), tl.float32)
        by_back = settle(by_d1 * load_tile(passed + 3 * F * C, i, 0, C, C, BF).to(tl.float32), dtype)
        store_tile(passed + 2 * F * C, by_back, i, 0, C, C, BF)

        hidden, hidden_q = load_tile(passed, i, 0, C, C, BF), load_tile(passed + F * C, i, 0, C, C, BF)
        by_hidden = multiply(hidden_q, tl.trans(crossed), dtype)
        written, pushed = weigh(hidden, writes2 + at_rows, -1.0, P, C)
        for at in tl.range(0, V, BV, disable_licm=True):
            d2 = load_tokens(error + at, C, V, V - at, BV, C)
            by_d2 = -multiply(load_tokens(by_u_q + at, left, H * V, V - at, BV, C), tl.trans(of_hidden), dtype)
            by_d2 = multiply(tl.trans(load_tile(kept + F * K, i, at, V, BV, BF)), by_back, dtype, by_d2)
            for j in tl.static_range(P):
                tile = load_tile(adjoint + j * MOMENTUM + F * K, i, at, V, BV, BF).to(dtype)
                share = -multiply(tile, d2, dtype)
                _store_sum(grad_writes2 + at_grads + j * C, share * hidden.to(tl.float32), 0, C, at > 0)
                by_hidden += share * load_row(writes2 + at_rows + j * C, C)
                by_d2 = multiply(tl.trans(tile), written if j == 0 else pushed, dtype, by_d2)
            store_tokens(partial_d2 + at_tile * (C * V) + at, by_d2, C, V, V - at, BV, C)
        by_z += by_hidden * load_tile(passed + 3 * F * C, i, 0, C, C, BF).to(tl.float32)
        store_tile(passed + 6 * F * C, by_z, i, 0, C, C, BF)


@triton.jit(do_not_specialize=["T", "keep", "number"])
def error_gradients_kernel(
    grad_o,
    k,
    v,
    norm_weight,
    u,  # (S, H, keep, C, V) or (M, H, C, V) float32
    partial_d2,  # (S, H, F // BF, C, ·) float32
    partial_q,
    partial_k,
    partial_weight1,
    partial_weight2,
    grad_u,  # (S, H, C, V)
    by_gain,  # (M, H, C // TOKENS, V) float32: the outputs' share, to which the errors' is added
    grad_q,
    grad_k,
    grad_v,
    grad_weight1,
    grad_weight2,
    cu_seqlens, first, T, keep, number,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """∂U, ∂V and ∂G₂ of a chunk; ∂Q, ∂K and ∂G₁ of the one behind it."""
    BLOCKS: tl.constexpr = C // TOKENS
    TILES: tl.constexpr = F // BF
    program, token = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * TOKENS
    at_partial = program * (TILES * C) + token
    begin, left, place = locate(program, number + 1, cu_seqlens, first, T, H, C, PACKED)
    if left > 0:
        at, left = (begin + token) * H + place % H, left - token
        by_q = load_sum(partial_q + at_partial * K, C * K, K, WK, TILES)
        by_k = load_sum(partial_k + at_partial * K, C * K, K, WK, TILES)
        if RESIDUAL:  # of the outputs, and of the errors, whose other part v is
            by_q += load_tokens(grad_o + at * V, left, H * V, V, WV, TOKENS).to(tl.float32)
            by_k -= load_tokens(grad_v + at * V, left, H * V, V, WV, TOKENS).to(tl.float32)
        store_tokens(grad_q + at * K, by_q, left, H * K, K, WK, TOKENS)
        store_tokens(grad_k + at * K, by_k, left, H * K, K, WK, TOKENS)
        by_weight = load_sum(partial_weight1 + at_partial * C, C * C, C, C, TILES)
        store_tokens(grad_weight1 + (place * C + token) * C, by_weight, TOKENS, C, C, C, TOKENS)
    begin, left, place = locate(program, number, cu_seqlens, first, T, H, C, PACKED)
    if (number >= 0) & (left > 0):
        at, left = (begin + token) * H + place % H, left - token
        x, y = load_tokens(k + at * K, left, H * K, K, WK, TOKENS), load_tokens(v + at * V, left, H * V, V, WV, TOKENS)
        gain = load_gain(norm_weight, program % H, V, WV, NORM)
        slot = slot_of(program, place, number, keep, ALL)
        value = load_tokens(u + (slot * C + token) * V, TOKENS, V, V, WV, TOKENS)
        by_d2 = load_sum(partial_d2 + at_partial * V, C * V, V, WV, TILES)
        by_e, by_u, of_gain = error_gradients(by_d2, value, x, y, gain, V, WV, NORM, RESIDUAL)
        store_tokens(grad_v + at * V, -by_e, left, H * V, V, WV, TOKENS)
        store_tokens(grad_u + (program * C + token) * V, by_u, TOKENS, V, V, WV, TOKENS)
        if NORM:
            _store_sum(by_gain + (place * BLOCKS + token // TOKENS) * V, of_gain, 1, V, True)
        by_weight = load_sum(partial_weight2 + at_partial * C, C * C, C, C, TILES)
        store_tokens(grad_weight2 + (place * C + token) * C, by_weight, TOKENS, C, C, C, TOKENS)


@triton.jit
def _add_product(p, x, y, more):
    """Σ x y; `more`: to be added to what is there."""
    tl.store(p, tl.load(p, mask=more, other=0.0) + tl.sum(x * y))


@triton.jit
def _recall(
    kept, adjoint, i, at, read, moved, y, ends, by_ends, MOMENTUM: tl.constexpr, WIDTH: tl.constexpr,
    BW: tl.constexpr, P: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Of columns of a layer's tile: → ∂W but for what U or Z have read; make ∂S of ∂S'. What U_q or Z_q have read of W
    and S is `read` and `moved` (BF, C) times y (BW, C)."""
    tile = load_tile(adjoint, i, at, WIDTH, BW, BF)
    _add_product(by_ends, tile, load_tile(kept, i, at, WIDTH, BW, BF).to(tl.float32), at > 0)
    if P == 2:
        state = load_tile(kept + MOMENTUM, i, at, WIDTH, BW, BF).to(tl.float32)
        behind = load_tile(adjoint + MOMENTUM, i, at, WIDTH, BW, BF)
        _add_product(by_ends + 1, tile, state, at > 0)
        _add_product(by_ends + 2, behind, state, at > 0)
        behind = behind * tl.load(ends + 2) + tile * tl.load(ends + 1)
        behind = multiply(moved, tl.trans(y), y.dtype, behind)
        tl.debug_barrier()  # what is written over has been read
        store_tile(adjoint + MOMENTUM, behind, i, at, WIDTH, BW, BF)
    return multiply(read, tl.trans(y), y.dtype, tile * tl.load(ends))


@triton.jit(do_not_specialize=["T", "keep", "number"])
def update_kernel(
    q,
    k,
    reads1, weight1, ends1, writes1, reads2, ends2,
    kept,
    errors,
    grad_u_q,
    grad_u,  # (S, H, C, V)
    adjoint,  # becomes ∂W, ∂S
    passed,
    partial_q,  # (S, H, F // BF, C, ·) float32
    partial_k,
    partial_weight1,
    grad_reads1,  # (M, H, F // BF, P, C) float32
    grad_ends1,  # (M, H, F // BF, 1 or 3)
    grad_ends2,
    cu_seqlens, first, T, keep, number,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = k.dtype.element_ty
    MOMENTUM: tl.constexpr = F * (K + V)
    TILES: tl.constexpr = F // BF
    ENDS: tl.constexpr = 1 if P == 1 else 3
    program, i = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BF
    begin, left, place = locate(program, number, cu_seqlens, first, T, H, C, PACKED)
    if left > 0:
        token, row = begin * H + place % H, tl.arange(0, C)
        key, query, by_u_q = k + token * K, q + token * K, grad_u_q + token * V
        transposed = row[None, :] * C + row[:, None]
        slot, at_rows = slot_of(program, place, number, keep, ALL), place * (P * C)
        at_tile, at_grads = program * TILES + i // BF, place * TILES + i // BF
        kept += slot * (P * MOMENTUM)
        adjoint += program * (P * MOMENTUM)
        passed += program * (7 * F * C)
        error, by_u = errors + slot * (C * V), grad_u + program * (C * V)

        by_z = apply(kept + F * K, i, by_u, C, V, V, BV, C, BF, dtype)
        by_z *= load_tile(passed + 3 * F * C, i, 0, C, C, BF).to(tl.float32)
        by_z = (by_z + load_tile(passed + 6 * F * C, i, 0, C, C, BF).to(tl.float32)).to(dtype)
        hidden, hidden_q = load_tile(passed, i, 0, C, C, BF), load_tile(passed + F * C, i, 0, C, C, BF)
        by_back = load_tile(passed + 2 * F * C, i, 0, C, C, BF)
        read, moved = weigh(hidden_q, reads2 + at_rows, 1.0, P, C)
        for at in tl.range(0, V, BV, disable_licm=True):
            tile = _recall(
                kept + F * K, adjoint + F * K, i, at, read, moved,
                load_tokens(by_u_q + at, left, H * V, V - at, BV, C), ends2 + place * ENDS,
                grad_ends2 + at_grads * ENDS, MOMENTUM, V, BV, P, BF,
            )  # fmt: skip
            tile = multiply(hidden, tl.trans(load_tokens(by_u + at, C, V, V - at, BV, C)), dtype, tile)
            tile = multiply(by_back, tl.trans(load_tokens(error + at, C, V, V - at, BV, C)), dtype, tile)
            tl.debug_barrier()
            store_tile(adjoint + F * K, tile, i, at, V, BV, BF)
        tl.debug_barrier()

        d1, by_z_q = load_tile(passed + 4 * F * C, i, 0, C, C, BF), load_tile(passed + 5 * F * C, i, 0, C, C, BF)
        products = -multiply(tl.trans(d1), by_z_q, dtype)
        by_weight1 = scores(key, query, left, H * K, H * K, K, BK, C) * products
        tl.store(partial_weight1 + at_tile * (C * C) + transposed, by_weight1)
        products = (products * tl.load(weight1 + place * (C * C) + transposed)).to(dtype)
        read, moved = weigh(by_z_q, reads1 + at_rows, 1.0, P, C)
        written, pushed = weigh(d1, writes1 + at_rows, -1.0, P, C)
        for at in tl.range(0, K, BK, disable_licm=True):
            x = load_tokens(key + at, left, H * K, K - at, BK, C)
            x_q = load_tokens(query + at, left, H * K, K - at, BK, C)
            by_q = multiply(x, products, dtype)
            for j in tl.static_range(P):
                share = multiply(tl.trans(load_tile(kept + j * MOMENTUM, i, at, K, BK, BF)), by_z_q, dtype)
                _store_sum(grad_reads1 + (at_grads * P + j) * C, share * x_q.to(tl.float32), 0, C, at > 0)
                by_q += share * load_row(reads1 + at_rows + j * C, C)
            store_tokens(partial_q + at_tile * (C * K) + at, by_q, C, K, K - at, BK, C)
            by_k = multiply(x_q, tl.trans(products), dtype)
            by_k = multiply(tl.trans(load_tile(kept, i, at, K, BK, BF)), by_z, dtype, by_k)
            for j in tl.static_range(P):
                tile = tl.trans(load_tile(adjoint + j * MOMENTUM, i, at, K, BK, BF))
                by_k = multiply(tile, written if j == 0 else pushed, dtype, by_k)
            store_tokens(partial_k + at_tile * (C * K) + at, by_k, C, K, K - at, BK, C)
            tile = _recall(
                kept, adjoint, i, at, read, moved, x_q, ends1 + place * ENDS, grad_ends1 + at_grads * ENDS,
                MOMENTUM, K, BK, P, BF,
            )  # fmt: skip
            tile = multiply(by_z, tl.trans(x), dtype, tile)
            tl.debug_barrier()
            store_tile(adjoint, tile, i, at, K, BK, BF)
