"""The walk backwards over one group of a sequence's chunks (`triton_mlp_gradients.py` has what it does to each layer).

The adjoint of the state lies in memory and is carried from chunk to chunk, and from group to group. A program owns a
sequence and a head. Registers are few, so the compiler is not to move out of the loop what does not change in it, and
what one phase of a chunk needs is loaded for it.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import sequence
from riverrun.kernels.neural_memory.triton_mlp_gradients import (
    first_reads,
    first_update,
    first_writes,
    second_reads,
    second_update,
    second_writes,
)  # fmt: skip
from riverrun.kernels.neural_memory.triton_mlp_tiles import (
    error,
    error_gradients,
    load_gain,
    load_tokens,
    multiply,
    store_tokens,
    through_norm,
    unit,
)  # fmt: skip


@triton.jit
def _add_gain(p, x, V: tl.constexpr, BV: tl.constexpr):
    """Sums over the tokens of x (BV, C)."""
    value = tl.arange(0, BV)
    tl.store(p + value, tl.sum(x, 1) + tl.load(p + value, mask=value < V, other=0.0), mask=value < V)


@triton.jit(do_not_specialize=["keep", "group"])
def backward_kernel(
    grad_o,  # (B, T, H, V)
    q,
    k,
    v,
    reads1,
    weight1,
    ends1,
    writes1,
    reads2,
    weight2,
    ends2,
    writes2,
    norm_weight,
    before_norm,  # (B, T, H, V): U_q
    states,  # (S, keep + 1, H, P, F (K + V)): before the group's chunks
    passed,  # (S, keep + 1, H, 3, F, C): H, H_q and W₂ δ₂ of them
    u_of_chunks,  # (S, keep, H, C, V) float32
    inner,  # (S, H, 4, F, C)
    between,  # (S, H, 2, C, V): δ₂ and ∂U_q
    adjoint,  # (S, H, P, F (K + V)) float32: after the group; becomes that before it
    grad_q,
    grad_k,
    grad_v,
    grad_reads1,
    grad_weight1,
    grad_ends1,
    grad_writes1,
    grad_reads2,
    grad_weight2,
    grad_ends2,
    grad_writes2,
    grad_norm,  # (S, H, V) float32: of later groups; this one's is added
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
    PACKED: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    BLOCK: tl.constexpr = (K + V) * F
    ENDS: tl.constexpr = 1 if P == 1 else 3
    s, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    begin, tokens, c = sequence(cu_seqlens, first, s, T, C, PACKED)
    row = tl.arange(0, C)
    adjoint += (s * H + h) * (P * BLOCK)
    inner += (s * H + h) * (4 * F * C)
    gain = load_gain(norm_weight, h, V, BV, NORM)

    start = group * keep * C
    end = tl.minimum(tokens, start + keep * C)
    last = start + (tl.cdiv(end - start, C) - 1) * C
    for back in tl.range(0, end - start, C, disable_licm=True):
        at = last - back
        at_key, at_value = ((begin + at) * H + h) * K, ((begin + at) * H + h) * V
        left, index = tokens - at, (c + at // C) * H + h
        number = (at - start) // C
        slot = (s * (keep + 1) + number) * H + h
        p_state, p_passed = states + slot * (P * BLOCK), passed + slot * (3 * F * C)
        p_u = u_of_chunks + ((s * keep + number) * H + h) * (C * V)
        at_rows, at_ends, transposed = index * (P * C), index * ENDS, row[None, :] * C + row[:, None]
        p_weight1, p_weight2 = weight1 + index * (C * C) + transposed, weight2 + index * (C * C) + transposed

        p_between = between + (s * H + h) * (2 * C * V)
        x, values = load_tokens(k + at_key, left, H * K, K, BK, C), load_tokens(v + at_value, left, H * V, V, BV, C)
        d2 = error(load_tokens(p_u, left, V, V, BV, C), x, values, gain, V, BV, NORM, RESIDUAL).to(dtype)
        by_u_q = load_tokens(grad_o + at_value, left, H * V, V, BV, C)
        if NORM:
            n, factor = unit(load_tokens(before_norm + at_value, left, H * V, V, BV, C).to(tl.float32), V, BV)
            _add_gain(grad_norm + (s * H + h) * V, by_u_q.to(tl.float32) * n, V, BV)
            by_u_q = through_norm(gain * by_u_q.to(tl.float32), n, factor, V, BV)
        by_u_q = by_u_q.to(dtype)
        store_tokens(p_between, d2, C, V, V, BV, C)
        store_tokens(p_between + C * V, by_u_q, C, V, V, BV, C)
        crossed = (multiply(tl.trans(d2), by_u_q, dtype) * -tl.load(p_weight2)).to(dtype)

        second_reads(
            p_state + F * K, p_passed, inner, by_u_q, crossed, reads2 + at_rows, grad_reads2 + at_rows,
            C, P, F, V, BV, BF, BLOCK,
        )  # fmt: skip
        x, x_q = load_tokens(k + at_key, left, H * K, K, BK, C), load_tokens(q + at_key, left, H * K, K, BK, C)
        scores = (multiply(tl.trans(x), x_q, dtype) * tl.load(p_weight1)).to(dtype)
        first_reads(
            p_state, p_passed, inner, x, x_q, scores, reads1 + at_rows, grad_reads1 + at_rows,
            C, P, K, F, BK, BF, BLOCK, SILU,
        )  # fmt: skip
        d2 = load_tokens(p_between, C, V, V, BV, C)
        by_d2, products = second_writes(
            adjoint + F * K, p_passed, inner, d2, crossed, writes2 + at_rows, grad_writes2 + at_rows,
            C, P, F, V, BV, BF, BLOCK,
        )  # fmt: skip
        by_u_q = load_tokens(p_between + C * V, C, V, V, BV, C)
        tl.store(grad_weight2 + index * (C * C) + transposed, -multiply(tl.trans(d2), by_u_q, dtype) * products)
        by_d2 -= multiply(by_u_q, tl.trans(products * tl.load(p_weight2)), dtype)
        x = load_tokens(k + at_key, left, H * K, K, BK, C)
        by_d2 = first_writes(
            p_state + F * K, adjoint, p_passed, inner, x, scores, by_d2, writes1 + at_rows, grad_writes1 + at_rows,
            C, P, K, F, V, BK, BV, BF, BLOCK,
        )  # fmt: skip

        x, values = load_tokens(k + at_key, left, H * K, K, BK, C), load_tokens(v + at_value, left, H * V, V, BV, C)
        u = load_tokens(p_u, left, V, V, BV, C)
        by_e, by_u, by_gain = error_gradients(by_d2, u, x, values, gain, V, BV, NORM, RESIDUAL)
        store_tokens(grad_v + at_value, -by_e, left, H * V, V, BV, C)
        if RESIDUAL:  # until ∂K is whole
            store_tokens(p_u, by_e, left, V, V, BV, C)
        if NORM:
            _add_gain(grad_norm + (s * H + h) * V, by_gain, V, BV)

        d2, by_u_q = load_tokens(p_between, C, V, V, BV, C), load_tokens(p_between + C * V, C, V, V, BV, C)
        second_update(
            p_state + F * K, adjoint + F * K, p_passed, inner, d2, by_u.to(dtype), by_u_q, reads2 + at_rows,
            ends2 + at_ends, grad_ends2 + at_ends, C, P, F, V, BV, BF // 2, BLOCK,
        )  # fmt: skip
        x, x_q = load_tokens(k + at_key, left, H * K, K, BK, C), load_tokens(q + at_key, left, H * K, K, BK, C)
        by_q, by_k, products = first_update(
            p_state, adjoint, inner, x, x_q, reads1 + at_rows, ends1 + at_ends, writes1 + at_rows,
            grad_ends1 + at_ends, C, P, K, F, BK, BF // 2, BLOCK,
        )  # fmt: skip
        tl.store(grad_weight1 + index * (C * C) + transposed, -multiply(tl.trans(x), x_q, dtype) * products)
        products = (products * -tl.load(p_weight1)).to(dtype)
        by_q += multiply(x, products, dtype)
        by_k += multiply(x_q, tl.trans(products), dtype)
        if RESIDUAL:
            by_q += load_tokens(grad_o + at_value, left, H * V, V, BV, C).to(tl.float32)
            by_k += load_tokens(p_u, left, V, V, BV, C)
        store_tokens(grad_q + at_key, by_q, left, H * K, K, BK, C)
        store_tokens(grad_k + at_key, by_k, left, H * K, K, BK, C)
        tl.debug_barrier()
