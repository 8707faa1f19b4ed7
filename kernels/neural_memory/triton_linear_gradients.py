"""The gradients of a chunk of a linear memory, from W, S at its start, the adjoints dW', dS' at its end, E and Y (see
`triton_linear_walk.py`), and X, Z of `triton_linear_within.py`.

    dQ = β dO Wᵀ + f dO Sᵀ + X K
    dK = β⁻ Y Wᵀ + f⁻ Y Sᵀ − g E dW'ᵀ − n E dS'ᵀ + Xᵀ Q + (Z + Zᵀ) K        (anchored: Y Wᵀ, no f⁻, no Z)

The gates' gradients are the products of rows of these terms, without their gates, with q or k; and for those of the
chunk's end ⟨dW', W⟩, ⟨dW', S⟩ and ⟨dS', S⟩.

Two programs share a chunk, one has dQ, the other dK: they run side by side, so that what both load is loaded once. Each
goes over tiles of keys' channels, whose sums over the values' channels few registers hold. Shared memory holds the rows
of dO, or of E and Y, and X and Z from one tile to the next if they are RESIDENT, while the states of the next tiles
come; or else each tile goes over tiles of the values' channels too.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.common.triton_math import dot
from riverrun.kernels.gated_delta.triton_products import load_rows, store_rows
from riverrun.kernels.neural_memory.triton_linear_prepare import late, late_rows


@triton.jit
def _store_early(p, x, t, SHIFT: tl.constexpr, end, C: tl.constexpr):
    """The gradients of the entries that `late` has read, with what the last entry has besides."""
    entry = t - SHIFT
    tl.store(p + entry, x + tl.where(entry == C - 1, end, 0.0), mask=entry >= 0)
    if SHIFT > 0:
        tl.store(p + C - 1, end)


@triton.jit
def _add_of_queries(
    sums, g_o, p_W, p_S, p_dW, p_dS, channel, column, K: tl.constexpr, V: tl.constexpr, MOMENTUM: tl.constexpr
):
    """dO Wᵀ, dO Sᵀ (C, BK), ⟨dW', W⟩, ⟨dW', S⟩ and ⟨dS', S⟩ (BK,), with what these columns of V add to them."""
    of_W, of_S, flow, flow_carry, flow_momentum = sums
    in_K = channel < K
    W = load_rows(p_W, channel, in_K, V, column, V)
    dW = load_rows(p_dW, channel, in_K, V, column, V).to(tl.float32)
    of_W = dot(g_o, tl.trans(W), of_W)
    flow += tl.sum(W.to(tl.float32) * dW, 1)
    if MOMENTUM:
        S = load_rows(p_S, channel, in_K, V, column, V)
        dS = load_rows(p_dS, channel, in_K, V, column, V).to(tl.float32)
        of_S = dot(g_o, tl.trans(S), of_S)
        flow_carry += tl.sum(S.to(tl.float32) * dW, 1)
        flow_momentum += tl.sum(S.to(tl.float32) * dS, 1)
    return of_W, of_S, flow, flow_carry, flow_momentum


@triton.jit
def _add_of_keys(
    sums, Y, E, p_W, p_S, p_dW, p_dS, channel, column, K: tl.constexpr, V: tl.constexpr, MOMENTUM: tl.constexpr,
    ONLINE: tl.constexpr,
):  # fmt: skip
    """Y Wᵀ, Y Sᵀ, E dW'ᵀ and E dS'ᵀ (C, BK), with what these columns of V add to them."""
    of_W, of_S, to_W, to_S = sums
    in_K = channel < K
    of_W = dot(Y, tl.trans(load_rows(p_W, channel, in_K, V, column, V)), of_W)
    to_W = dot(E, tl.trans(load_rows(p_dW, channel, in_K, V, column, V)), to_W)
    if MOMENTUM:
        to_S = dot(E, tl.trans(load_rows(p_dS, channel, in_K, V, column, V)), to_S)
        if ONLINE:
            of_S = dot(Y, tl.trans(load_rows(p_S, channel, in_K, V, column, V)), of_S)
    return of_W, of_S, to_W, to_S


@triton.jit(do_not_specialize=["T"])
def gradients_kernel(
    grad_o,  # (B, T, H, V)
    q,  # (B, T, H, K)
    k,  # (B, T, H, K)
    decay,  # (M, H, C) float32
    weight,  # (M, H, C, C) float32
    carry,  # (M, H, C) float32
    momentum_weight,  # (M, H, C) float32
    states,  # (M, H, K, V): W at the chunks' starts
    momenta,  # (M, H, K, V): S
    grad_states,  # (M, H, K, V): the adjoints of W at the chunks' ends
    grad_momenta,  # (M, H, K, V): those of S
    errors,  # (B, T, H, V): E
    grad_v,  # (B, T, H, V): −Y
    X,  # (M, H, C, C)
    Z,  # (M, H, C, C)
    grad_q,
    grad_k,
    grad_decay,  # (1, or 2 if ONLINE, M, H, C) float32, of reads and of errors
    grad_last,  # (M, H, C) float32, what the last row of G has here
    grad_carry,  # like grad_decay
    grad_momentum_decay,  # (M, H) float32
    grad_momentum_weight,  # (M, H, C) float32
    start,
    length,
    T,
    M,
    k_end,  # K and V, as for `products_of_rows`
    v_end,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RESIDENT: tl.constexpr,
    LATE: tl.constexpr,
    ONLINE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    part, c, h = tl.program_id(0) % 2, tl.program_id(0) // 2, tl.program_id(1)
    token, tokens = chunk(start, length, c, T, C, PACKED)
    if tokens > 0:
        index = tl.cast(c, tl.int64) * H + h
        t = tl.arange(0, C)
        here = t < tokens
        place_k, place_v, place = (token * H + h) * K, (token * H + h) * V, index * C
        p_W, p_S, p_dW, p_dS = (
            states + index * K * V, momenta + index * K * V, grad_states + index * K * V, grad_momenta + index * K * V
        )  # fmt: skip
        by_decay, by_carry = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        column = tl.arange(0, BV)
        if RESIDENT:
            of_scores = late_rows(X + place * C, t, LATE, C)
        if part == 0:
            flow, flow_carry, flow_momentum = (
                tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
            )  # fmt: skip
            kept = late(decay + place, t, LATE, 1.0)
            if MOMENTUM:
                carried = late(carry + place, t, LATE, 0.0)
            if RESIDENT:
                g_o = load_rows(grad_o + place_v, t, here, H * V, column, V)
            for k_start in tl.range(0, k_end, BK, num_stages=STAGES if RESIDENT else 1):
                channel = k_start + tl.arange(0, BK)
                none, zero = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
                sums = none, none, zero, zero, zero
                if RESIDENT:
                    sums = _add_of_queries(sums, g_o, p_W, p_S, p_dW, p_dS, channel, column, K, V, MOMENTUM)
                else:
                    for v_start in tl.range(0, v_end, BV, num_stages=STAGES):
                        g_o = load_rows(grad_o + place_v, t, here, H * V, v_start + column, V)
                        sums = _add_of_queries(
                            sums, g_o, p_W, p_S, p_dW, p_dS, channel, v_start + column, K, V, MOMENTUM
                        )
                of_W, of_S = sums[0], sums[1]
                flow, flow_carry, flow_momentum = flow + sums[2], flow_carry + sums[3], flow_momentum + sums[4]
                q_tile = load_rows(q + place_k, t, here, H * K, channel, K).to(tl.float32)
                k_tile = load_rows(k + place_k, t, here, H * K, channel, K)
                if not RESIDENT:
                    of_scores = late_rows(X + place * C, t, LATE, C)
                by_decay += tl.sum(of_W * q_tile, 1)
                by_q = of_W * kept[:, None]
                if MOMENTUM:
                    by_carry += tl.sum(of_S * q_tile, 1)
                    by_q += of_S * carried[:, None]
                store_rows(grad_q + place_k, dot(of_scores, k_tile, by_q), t, here, H * K, channel, K)
            _store_early(grad_decay + place, by_decay, t, LATE, tl.sum(flow), C)
            if MOMENTUM:
                _store_early(grad_carry + place, by_carry, t, LATE, tl.sum(flow_carry), C)
                tl.store(grad_momentum_decay + index, tl.sum(flow_momentum))
        else:
            by_weight, by_momentum_weight = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
            written = tl.load(weight + (place + C - 1) * C + t)
            if MOMENTUM:
                pushed = tl.load(momentum_weight + place + t)
            if ONLINE:
                kept = late(decay + place, t, 1, 1.0)
                if MOMENTUM:
                    carried = late(carry + place, t, 1, 0.0)
            if RESIDENT:
                Y = load_rows(grad_v + place_v, t, here, H * V, column, V)  # −Y, as all of this
                E = load_rows(errors + place_v, t, here, H * V, column, V)
                if ONLINE:
                    of_keys = late_rows(Z + place * C, t, 1, C)
            for k_start in tl.range(0, k_end, BK, num_stages=STAGES if RESIDENT else 1):
                channel = k_start + tl.arange(0, BK)
                none = tl.zeros([C, BK], tl.float32)
                tiles = none, none, none, none
                if RESIDENT:
                    tiles = _add_of_keys(tiles, Y, E, p_W, p_S, p_dW, p_dS, channel, column, K, V, MOMENTUM, ONLINE)
                else:
                    for v_start in tl.range(0, v_end, BV, num_stages=STAGES):
                        Y = load_rows(grad_v + place_v, t, here, H * V, v_start + column, V)
                        E = load_rows(errors + place_v, t, here, H * V, v_start + column, V)
                        tiles = _add_of_keys(
                            tiles, Y, E, p_W, p_S, p_dW, p_dS, channel, v_start + column, K, V, MOMENTUM, ONLINE
                        )
                of_W, of_S, to_W, to_S = tiles
                q_tile = load_rows(q + place_k, t, here, H * K, channel, K)
                k_tile = load_rows(k + place_k, t, here, H * K, channel, K)
                keys = k_tile.to(tl.float32)
                by_weight -= tl.sum(to_W * keys, 1)
                by_k = -to_W * written[:, None]
                if MOMENTUM:
                    by_momentum_weight -= tl.sum(to_S * keys, 1)
                    by_k -= to_S * pushed[:, None]
                if ONLINE:
                    by_decay -= tl.sum(of_W * keys, 1)
                    by_k -= of_W * kept[:, None]
                    if MOMENTUM:
                        by_carry -= tl.sum(of_S * keys, 1)
                        by_k -= of_S * carried[:, None]
                    if not RESIDENT:
                        of_keys = late_rows(Z + place * C, t, 1, C)
                    by_k = dot(of_keys, k_tile, by_k)
                    by_k = dot(tl.trans(of_keys), k_tile, by_k)
                else:
                    by_k -= of_W
                if not RESIDENT:
                    of_scores = late_rows(X + place * C, t, LATE, C)
                by_k = dot(tl.trans(of_scores), q_tile, by_k)
                store_rows(grad_k + place_k, by_k, t, here, H * K, channel, K)
            tl.store(grad_last + place + t, by_weight)
            if MOMENTUM:
                tl.store(grad_momentum_weight + place + t, by_momentum_weight)
            if ONLINE:
                every = tl.cast(M, tl.int64) * H * C
                _store_early(grad_decay + every + place, by_decay, t, 1, 0.0, C)
                if MOMENTUM:
                    _store_early(grad_carry + every + place, by_carry, t, 1, 0.0, C)
