"""The states between segments of a sequence, from the segments' affine maps (see `common/triton_segments.py`).

Forwards S ↦ M S + U, from the sequence's initial state; backwards, for adjoints, dS ↦ Mᵀ dS + W, from its final one. A
program owns one sequence, one head and BV columns.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_math import dot


@triton.jit
def between_kernel(
    transition,  # (segments, H, K, …): M in the first K of its columns
    offset,  # (segments, H, K, …): U or W in the first V of its columns
    outer,  # (S, H, K, V) float32: the initial states, or the adjoints of the final ones
    states,  # (segments, H, K, V) float32: where each segment's walk begins
    last_state,  # (S, H, K, V) float32: after all segments
    first,  # (S + 1,) int32
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TRANSITION_STRIDE: tl.constexpr,  # from row to row
    OFFSET_STRIDE: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    KEEP_LAST: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    s, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    begin, end = tl.load(first + s), tl.load(first + s + 1)
    state = ()
    for i in tl.static_range(NK):
        row = i * BK + tl.arange(0, BK)
        if HAS_OUTER:
            p_outer = outer + (s * H + h) * K * V + row[:, None] * V + column[None, :]
            tile = tl.load(p_outer, mask=(row < K)[:, None] & (column < V)[None, :], other=0.0)
        else:
            tile = tl.zeros([BK, BV], tl.float32)
        state = state + (tile,)
    for done in range(begin, end):
        at = begin + end - 1 - done if BACKWARD else done
        place = (tl.cast(at, tl.int64) * H + h) * K
        new = ()
        for i in tl.static_range(NK):
            row = i * BK + tl.arange(0, BK)
            mask = (row < K)[:, None] & (column < V)[None, :]
            tl.store(states + place * V + row[:, None] * V + column[None, :], state[i], mask=mask)
            p_offset = offset + place * OFFSET_STRIDE + row[:, None] * OFFSET_STRIDE + column[None, :]
            tile = tl.load(p_offset, mask=mask, other=0.0)
            for j in tl.static_range(NK):
                other = j * BK + tl.arange(0, BK)
                p = transition + place * TRANSITION_STRIDE
                if BACKWARD:
                    p += other[None, :] * TRANSITION_STRIDE + row[:, None]
                else:
                    p += row[:, None] * TRANSITION_STRIDE + other[None, :]
                M = tl.load(p, mask=(row < K)[:, None] & (other < K)[None, :], other=0.0)
                tile = dot(M, state[j], tile)
            new = new + (tile,)
        state = new
    if KEEP_LAST:
        for i in tl.static_range(NK):
            row = i * BK + tl.arange(0, BK)
            p_last = last_state + (s * H + h) * K * V + row[:, None] * V + column[None, :]
            tl.store(p_last, state[i], mask=(row < K)[:, None] & (column < V)[None, :])
