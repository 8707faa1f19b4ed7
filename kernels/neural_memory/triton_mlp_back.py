"""The walk back over a group of a sequence's chunks, whose states are there.

With the names of `triton_mlp_walk.py`, ∂X the gradient of X, W and S the weights and momentum before the chunk, and
∂W' and ∂S' what comes from behind it, layer ₂ gives

    ∂H_q = W₂ ∂U_q β₂ + S₂ ∂U_q f₂ + H X        ∂H = H_q Xᵀ − ∂W₂' δ₂ diag(G₂b) − ∂S₂' δ₂ diag(N₂b)
    ∂δ₂ = −∂W₂'ᵀ H diag(G₂b) − ∂S₂'ᵀ H diag(N₂b) − ∂U_q (G₂ ∘ H_qᵀ H)        X = −G₂ᵀ ∘ δ₂ᵀ ∂U_q

then layer ₁, with B = W₂ δ₂,

    ∂Z_q = ∂H_q ∘ φ'(Z_q)        ∂δ₁ = −∂Z_q (G₁ ∘ Qᵀ K) − ∂W₁'ᵀ K diag(G₁b) − ∂S₁'ᵀ K diag(N₁b)
    ∂B = ∂δ₁ ∘ φ'(Z)        ∂Z = ∂H ∘ φ'(Z) + ∂δ₁ ∘ B ∘ φ''(Z)        ∂δ₂ += W₂ᵀ ∂B

and, since δ₂ is a function of U,

    ∂Z += (W₂ ∂U) ∘ φ'(Z)
    ∂W₂ = β₂b ∂W₂' + H_q diag(β₂) ∂U_qᵀ + H ∂Uᵀ + ∂B δ₂ᵀ        ∂S₂ = f₂b ∂W₂' + m₂ ∂S₂' + H_q diag(f₂) ∂U_qᵀ
    ∂W₁ᵀ = β₁b ∂W₁'ᵀ + ∂Z_q diag(β₁) Qᵀ + ∂Z Kᵀ        ∂S₁ᵀ = f₁b ∂W₁'ᵀ + m₁ ∂S₁'ᵀ + ∂Z_q diag(f₁) Qᵀ
    ∂Q = W₁ ∂Z_q β₁ + S₁ ∂Z_q f₁ + K Y        ∂K = W₁ ∂Z − ∂W₁' δ₁ diag(G₁b) − ∂S₁' δ₁ diag(N₁b) + Q Yᵀ
    Y = −G₁ᵀ ∘ δ₁ᵀ ∂Z_q

What depends on ∂W' and ∂S' has to go from chunk to chunk; `triton_mlp_around.py` does all else, of all chunks at once.
`back_kernel` walks as `walk_kernel` does, ∂W and ∂S in registers: its team meets to sum ∂δ₂, of which each program
makes ∂U of a few tokens, and meets again.
"""

import triton
import triton.language as tl

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
    take,
)  # fmt: skip
from riverrun.kernels.neural_memory.triton_mlp_meet import arrive, wait
from riverrun.kernels.neural_memory.triton_mlp_tiles import (
    afresh,
    apart,
    error_gradients,
    load_column,
    load_gain,
    load_rows,
    load_state,
    load_sum,
    load_tile,
    load_tokens,
    locate,
    settle,
    store_rows,
    store_state,
    store_sum,
    store_tokens,
    weigh,
    widen,
)  # fmt: skip


@triton.jit
def _back_chunk(
    A1, B1, A2, B2,  # ∂W₁', ∂S₁' (WK, BF), ∂W₂', ∂S₂' (BF, WV), float32
    of_gain,  # (WV,), so far
    met, counter,
    q, k, v,
    gain,
    reads1, ends1, writes1, reads2, ends2, writes2,
    kept, behind,  # (P, F (K + V)), of this chunk, as k
    u, errors,  # (C, V), of this chunk
    grad_u_q,
    handed, crossings,
    by_u,  # (C, V), of this team
    partial_d2,  # (TILES, C, V)
    grad_v,
    grad_writes1, grad_writes2,
    begin, left, place, own, tile,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    TILES: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = k.dtype.element_ty
    ENDS: tl.constexpr = 1 if P == 1 else 3
    h, token, once, i = place % H, tile * SHARE, tl.minimum(left, 1), tile * BF
    at_rows, at_grads = place * (P * C), (place * TILES + tile) * (P * C)
    store_state(behind, A1, B1, A2, B2, i, K, F, V, P, WK, WV, BF)

    x = load_rows(k + (begin * H + h) * K, left, H * K, K, WK, C)
    d1 = take(handed, own, ERROR, tile, C, BF, TILES)
    by_d1 = take(handed, own, GRAD_ERROR, tile, C, BF, TILES).to(tl.float32)
    for j in tl.static_range(P):
        share = -apart(x, A1 if j == 0 else B1, dtype, once)
        store_sum(grad_writes1 + at_grads + j * C, share * widen(d1), 1, C)
        by_d1 += share * load_column(writes1 + at_rows + j * C, C)
    slope = take(handed, own, SLOPE, tile, C, BF, TILES)
    by_back = settle(by_d1 * widen(slope), dtype)
    by_z = by_d1 * take(handed, own, CURVED, tile, C, BF, TILES).to(tl.float32)
    hidden = take(handed, own, HIDDEN, tile, C, BF, TILES)
    d2 = load_rows(errors, C, V, V, WV, C)
    by_hidden = take(handed, own, GRAD_HIDDEN, tile, C, BF, TILES).to(tl.float32)
    for j in tl.static_range(P):
        share = -apart(d2, tl.trans((A2 if j == 0 else B2).to(dtype)), dtype, once)
        store_sum(grad_writes2 + at_grads + j * C, share * widen(hidden), 1, C)
        by_hidden += share * load_column(writes2 + at_rows + j * C, C)
    by_z = settle(by_z + by_hidden * widen(slope), tl.float32)
    by_u_q = load_rows(grad_u_q + (begin * H + h) * V, left, H * V, V, WV, C)
    crossed = load_rows(crossings + (own * TILES + tile) * (C * C), C, C, C, C, C)
    by_d2 = apart(tl.trans(crossed), by_u_q, dtype, once)
    by_d2 = apart(by_back, load_tile(kept + F * K, i, V, WV, BF), dtype, once, by_d2)
    for j in tl.static_range(P):
        written = weigh(hidden, writes2 + at_rows + j * C, -1.0, C)
        by_d2 = apart(written, A2 if j == 0 else B2, dtype, once, by_d2)
    store_rows(partial_d2 + tile * (C * V), by_d2, C, V, V, WV, C)
    arrive(counter)
    met += TILES
    # what does not need the others' shares
    hidden_q = take(handed, own, HIDDEN_Q, tile, C, BF, TILES)
    if P == 2:
        B2 = B2 * tl.load(ends2 + place * ENDS + 2) + A2 * tl.load(ends2 + place * ENDS + 1)
        B2 = apart(tl.trans(weigh(hidden_q, reads2 + at_rows + C, 1.0, C)), by_u_q, dtype, once, B2)
    A2 = apart(tl.trans(by_back), d2, dtype, once, A2 * tl.load(ends2 + place * ENDS))
    A2 = apart(tl.trans(weigh(hidden_q, reads2 + at_rows, 1.0, C)), by_u_q, dtype, once, A2)
    wait(counter, met)
    if token < C:
        at = (begin + token) * H + h
        mine = load_tokens(k + at * K, left - token, H * K, K, WK, SHARE)
        wanted = load_tokens(v + at * V, left - token, H * V, V, WV, SHARE)
        value = load_tokens(u + token * V, SHARE, V, V, WV, SHARE)
        total = load_sum(partial_d2 + token * V, C * V, V, WV, TILES, SHARE)
        by_e, by_value, by_gain = error_gradients(total, value, mine, wanted, gain, V, WV, NORM, RESIDUAL)
        store_tokens(grad_v + at * V, -by_e, left - token, H * V, V, WV, SHARE)
        store_tokens(by_u + token * V, by_value, SHARE, V, V, WV, SHARE)
        if NORM:
            of_gain += tl.sum(by_gain, 1)
    arrive(counter)
    met += TILES
    by_z_q = take(handed, own, GRAD_Z_Q, tile, C, BF, TILES)
    y = tl.trans(load_rows(q + (begin * H + h) * K, left, H * K, K, WK, C))
    if P == 2:
        B1 = B1 * tl.load(ends1 + place * ENDS + 2) + A1 * tl.load(ends1 + place * ENDS + 1)
        B1 = apart(y, weigh(by_z_q, reads1 + at_rows + C, 1.0, C), dtype, once, B1)
    A1 = apart(y, weigh(by_z_q, reads1 + at_rows, 1.0, C), dtype, once, A1 * tl.load(ends1 + place * ENDS))
    wait(counter, met)

    by_value = load_rows(by_u, C, V, V, WV, C)
    slope = take(handed, own, SLOPE, tile, C, BF, TILES)
    by_z += apart(by_value, tl.trans(load_tile(kept + F * K, i, V, WV, BF)), dtype, once) * widen(slope)
    by_z = settle(by_z, dtype)
    hand_on(handed, by_z, own, GRAD_Z, tile, C, BF, TILES)
    hidden = take(handed, own, HIDDEN, tile, C, BF, TILES)
    A2 = apart(tl.trans(hidden), by_value, dtype, once, A2)
    x = load_rows(k + (begin * H + h) * K, left, H * K, K, WK, C)
    A1 = apart(tl.trans(x), by_z, dtype, once, A1)
    return A1, B1, A2, B2, of_gain, met


@triton.jit(do_not_specialize=["T", "keep", "heads", "start"])
def back_kernel(
    q, k, v, norm_weight,
    reads1, ends1, writes1, reads2, ends2, writes2,  # as in `walk_kernel`
    kept, u, errors, grad_u_q, handed, crossings,  # as in `before_kernel`; u as errors, but float32
    behind,  # (S, H, keep, P, F (K + V)), as k: ∂W', ∂S'
    adjoint,  # (S, H, P, F (K + V)) float32: of the state after the group; becomes that of the one before
    by_u,  # (teams, C, V)
    partial_d2,  # (teams, TILES, C, V) float32
    grad_v,
    grad_writes1, grad_writes2,  # (M, H, TILES, P, C) float32
    by_gain,  # (S, H, TILES, V) float32: what the gain gets of the errors, to which the group's is added
    counters,
    cu_seqlens, first, T, keep, heads, start,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Of the group that begins with chunk `start`, what depends on the chunks behind."""
    BLOCK: tl.constexpr = P * F * (K + V)
    tile, team = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    counter, met = counters + team, 0
    for head in tl.range(team, heads, tl.num_programs(0) // TILES, disable_licm=True):
        program = tl.cast(head, tl.int64)
        gain = load_gain(norm_weight, program % H, V, WV, NORM)
        begin, tokens, place = locate(program, start, cu_seqlens, first, T, H, C, PACKED)
        chunks, of_gain = tl.minimum(tl.cdiv(tokens, C), keep), tl.zeros([WV], tl.float32)
        if chunks > 0:
            A1, B1, A2, B2 = load_state(adjoint + program * BLOCK, tile * BF, K, F, V, P, WK, WV, BF)
            for step in tl.range(0, chunks, disable_licm=True):
                tile, number = afresh(tile), chunks - 1 - step
                scratch = tl.cast(afresh(team), tl.int64) * (C * V)
                at, own = place + number * H, program * keep + number
                slot = own
                if ALL:
                    slot = at
                A1, B1, A2, B2, of_gain, met = _back_chunk(
                    A1, B1, A2, B2, of_gain, met, counter, q, k, v, gain, reads1, ends1, writes1, reads2, ends2,
                    writes2, kept + slot * BLOCK, behind + own * BLOCK, u + slot * (C * V), errors + slot * (C * V),
                    grad_u_q, handed, crossings, by_u + scratch, partial_d2 + scratch * TILES, grad_v, grad_writes1,
                    grad_writes2, begin + number * C, tokens - number * C, at, own, tile, H, K, F, V, C, P, WK, WV, BF,
                    NORM, RESIDUAL, TILES, SHARE,
                )  # fmt: skip
            store_state(adjoint + program * BLOCK, A1, B1, A2, B2, tile * BF, K, F, V, P, WK, WV, BF)
            if NORM:
                value = tl.arange(0, WV)
                p, mask = by_gain + (program * TILES + tile) * V + value, value < V
                tl.store(p, tl.load(p, mask=mask, other=0.0) + of_gain, mask=mask)
