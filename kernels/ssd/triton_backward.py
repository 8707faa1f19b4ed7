"""The gradients of the state space dual recurrence, in two kernels.

`states_kernel` walks along each sequence twice: forwards with the state H, and backwards with its adjoint dH,

    Hᵀ ← e^{a_Q} Hᵀ + Bᵀ diag(e^{a_Q − a_j} dt_j) X        dHᵀ ← e^{a_Q} dHᵀ + Cᵀ diag(eᵃ) dY

and leaves H at each chunk's start and dH at its end, in the type of the inputs. `gradients_kernel` then has all that
it needs of a chunk. It goes through heads of a group, which share B and C. With s_j = e^{a_Q − a_j}:

    dX  = dt ⊙ u + D dY                   u = (L ⊙ C Bᵀ)ᵀ dY + diag(s) B dHᵀ
    dC  = dCB B + diag(eᵃ) dY H           dCB = L ⊙ dY Xᵀ ⊙ dt_j
    dB  = dCBᵀ C + diag(s dt) X dH
    ddt = w + A ddA                       w_j = Σ_i (L ⊙ C Bᵀ ⊙ dY Xᵀ)_ij + s_j ⟨(B dHᵀ)_j, X_j⟩

where ddA, the gradient of dt A, is the sum of the gradients of all a_i from its token on. Of these, E = dCB ⊙ C Bᵀ
below its diagonal gives Σ_j E_ij − Σ_j E_ji, the reading of the state e^{a_i} ⟨(C Hᵀ)_i, dY_i⟩. What the chunk writes
into the state carries a_Q − a_j, and so gives the sum of dt_j s_j ⟨(B dHᵀ)_j, X_j⟩ over the tokens *before*; what is
kept of the state gives e^{a_Q} ⟨dH, H⟩ to all. No gradient is the difference of two large sums that should cancel.
Here dt is Δ; its gradient goes on through the softplus as it is stored.

All of this is more than the registers of a program hold. Two programs share a chunk: one has what is read from the
state at its start, diag(eᵃ) dY H and its part of ddt, the other has the rest. They run side by side, so that what both
load is loaded once.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk, sequence
from riverrun.kernels.common.triton_math import dot, exp
from riverrun.kernels.ssd.triton_forward import load_rows, load_state, store_rows, store_state
from riverrun.kernels.ssd.triton_steps import load_bias, load_dt, step_sizes, through_softplus


@triton.jit
def states_kernel(
    x,  # (B, T, H, P), or dY
    dt,  # (B, T, H)
    dt_bias,  # (H,) float32
    A,  # (H,) float32
    B,  # (B, T, G, N), or C
    first_state,  # (S, H, P, N) float32
    states,  # (M, H, N, P)
    last_state,  # (S, H, P, N) float32
    decay,  # (S, H) float32: what is left, after the walk, of the state before it
    cu_seqlens,
    first,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    X_STRIDE: tl.constexpr,  # from token to token
    DT_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    KEEP_STATES: tl.constexpr,
    KEEP_LAST: tl.constexpr,
    KEEP_DECAY: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    walk, block = tl.program_id(0) // tl.cdiv(P, BP), tl.program_id(0) % tl.cdiv(P, BP)
    s, h = (walk // H).to(tl.int64), walk % H
    channel, row, step = block * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    begin, tokens, c = sequence(cu_seqlens, first, s, T, Q, PACKED)
    g, place = h // (H // G), (s * H + h) * P * N
    rate, bias = tl.load(A + h), load_bias(dt_bias, h, HAS_BIAS)
    if HAS_FIRST:
        state = load_state(first_state + place, row, channel, N, P)
    else:
        state = tl.zeros([BN, BP], tl.float32)
    left = 1.0
    last = (tl.cdiv(tokens, Q) - 1) * Q
    raw = load_dt(dt + h, begin, last if BACKWARD else 0, tokens, step, DT_STRIDE)
    for done in tl.range(0, tokens, Q, num_stages=STAGES):
        at = last - done if BACKWARD else done
        token = begin + at
        here = step < tokens - at
        if KEEP_STATES:
            store_rows(states + ((c + at // Q) * H + h) * N * P, state, row, row < N, P, channel, P)
        x_tile = load_rows(x + token * X_STRIDE + h * P, step, here, X_STRIDE, channel, P)
        B_tile = load_rows(B + token * B_STRIDE + g * N, step, here, B_STRIDE, row, N)
        d, a, end = step_sizes(raw, bias, rate, step, here, Q, SOFTPLUS)
        raw = load_dt(dt + h, begin, at - Q if BACKWARD else at + Q, tokens, step, DT_STRIDE)
        if BACKWARD:
            weight = exp(a)
        else:
            weight = d * exp(end - a)
        written = x_tile.to(tl.float32) * weight[:, None]
        state = dot(tl.trans(B_tile), written.to(x_tile.dtype), state * exp(end))
        if KEEP_DECAY:
            left *= exp(end)
    if KEEP_LAST:
        store_state(last_state + place, state, row, channel, N, P)
    if KEEP_DECAY and block == 0:
        tl.store(decay + s * H + h, left)


@triton.jit(do_not_specialize=["M"])  # or the self-check's few chunks would need a kernel of their own
def gradients_kernel(
    grad_y,  # (B, T, H, P)
    x,  # (B, T, H, P)
    dt,  # (B, T, H)
    dt_bias,  # (H,) float32
    A,  # (H,) float32
    B,  # (B, T, G, N)
    C,  # (B, T, G, N)
    D,  # (H,) or (H, P) float32
    states,  # (M, H, N, P)
    grad_states,  # (M, H, N, P)
    grad_x,  # (B, T, H, P)
    grad_dt,  # (2, B, T, H) float32
    grad_bias,  # (2, M, H) float32
    grad_A,  # (2, M, H) float32
    grad_B,  # (splits, B, T, G, N)
    grad_C,  # (splits, 2, B, T, G, N) float32
    grad_D,  # (M, H) or (M, H, P) float32
    start,
    length,
    T,
    M,
    all_tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    X_STRIDE: tl.constexpr,  # from token to token
    DT_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    BY_CHANNEL: tl.constexpr,  # D is (H, P)
    PACKED: tl.constexpr,
    READ_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    part, c = tl.program_id(0) % 2, tl.program_id(0) // 2 // (H // HEADS)
    first_head = tl.program_id(0) // 2 % (H // HEADS) * HEADS
    g, split = first_head // (H // G), (first_head % (H // G) // HEADS).to(tl.int64)
    row, step = tl.arange(0, BN), tl.arange(0, Q)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    here = step < tokens
    if tokens > 0 and part == 0:
        C_tile = load_rows(C + token * C_STRIDE + g * N, step, here, C_STRIDE, row, N)
        by_C = tl.zeros([Q, BN], tl.float32)
        for i in tl.range(0, HEADS, num_stages=READ_STAGES):
            h = first_head + i
            index = tl.cast(c, tl.int64) * H + h
            rate, bias = tl.load(A + h), load_bias(dt_bias, h, HAS_BIAS)
            raw = load_dt(dt + h, token, 0, tokens, step, DT_STRIDE)
            d, a, end = step_sizes(raw, bias, rate, step, here, Q, SOFTPLUS)
            by_a = tl.zeros([Q], tl.float32)
            flow = tl.zeros([BP], tl.float32)
            for p_start in tl.static_range(0, P, BP):
                channel = p_start + tl.arange(0, BP)
                y_tile = load_rows(grad_y + (token * H + h) * P, step, here, H * P, channel, P)
                state = load_rows(states + index * N * P, row, row < N, P, channel, P)
                adjoint = load_rows(grad_states + index * N * P, row, row < N, P, channel, P)
                flow += tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), 0)
                read = y_tile.to(tl.float32) * exp(a)[:, None]
                by_a += tl.sum(dot(C_tile, state) * read, 1)
                by_C = dot(read.to(dtype), tl.trans(state), by_C)
            by_step = tl.cumsum(by_a, 0, reverse=True) + tl.sum(flow, 0) * exp(end)
            tl.store(grad_A + index, tl.sum(by_step * d, 0))
            by_raw = through_softplus(by_step * rate, dt + h, token, tokens, step, bias, DT_STRIDE, SOFTPLUS)
            tl.store(grad_dt + (token + step) * H + h, by_raw, mask=here)
            if HAS_BIAS:
                tl.store(grad_bias + index, tl.sum(tl.where(here, by_raw, 0.0), 0))
        store_rows(grad_C + ((2 * split * all_tokens + token) * G + g) * N, by_C, step, here, G * N, row, N)
    elif tokens > 0:
        B_tile = load_rows(B + token * B_STRIDE + g * N, step, here, B_STRIDE, row, N)
        C_tile = load_rows(C + token * C_STRIDE + g * N, step, here, C_STRIDE, row, N)
        # matrices of tokens are transposed: rows j are what is written, columns i ≥ j what is read
        BC = dot(B_tile, tl.trans(C_tile)).to(dtype)
        by_BC = tl.zeros([Q, Q], tl.float32)
        by_B = tl.zeros([Q, BN], tl.float32)
        for i in tl.range(0, HEADS, num_stages=STAGES):
            h = first_head + i
            index = tl.cast(c, tl.int64) * H + h
            rate, bias = tl.load(A + h), load_bias(dt_bias, h, HAS_BIAS)
            raw = load_dt(dt + h, token, 0, tokens, step, DT_STRIDE)
            d, a, end = step_sizes(raw, bias, rate, step, here, Q, SOFTPLUS)
            kept = exp(end - a)
            x_tiles, y_tiles, adjoints = (), (), ()
            xy = tl.zeros([Q, Q], tl.float32)
            for p_start in tl.static_range(0, P, BP):
                channel = p_start + tl.arange(0, BP)
                x_tile = load_rows(x + token * X_STRIDE + h * P, step, here, X_STRIDE, channel, P)
                y_tile = load_rows(grad_y + (token * H + h) * P, step, here, H * P, channel, P)
                adjoint = load_rows(grad_states + index * N * P, row, row < N, P, channel, P)
                written = x_tile.to(tl.float32) * (d * kept)[:, None]
                by_B = dot(written.to(dtype), tl.trans(adjoint), by_B)
                xy = dot(x_tile, tl.trans(y_tile), xy)
                x_tiles, y_tiles, adjoints = x_tiles + (x_tile,), y_tiles + (y_tile,), adjoints + (adjoint,)
            if HAS_D and not BY_CHANNEL:
                by_skip = tl.sum(tl.where(step[:, None] == step[None, :], xy, 0.0), 1)
                tl.store(grad_D + index, tl.sum(by_skip, 0))

            L = exp(tl.where(step[:, None] <= step[None, :], a[None, :] - a[:, None], float("-inf")))
            xy *= L
            by_BC += xy * d[:, None]
            xy *= BC.to(tl.float32)
            by_d = tl.sum(xy, 1)
            xy = tl.where(step[:, None] < step[None, :], xy * d[:, None], 0.0)
            by_a = tl.sum(xy, 0) - tl.sum(xy, 1)
            scores = L * BC.to(tl.float32) * d[:, None]
            if HAS_D and not BY_CHANNEL:
                scores += tl.where(step[:, None] == step[None, :], tl.load(D + h), 0.0)

            by_kept = tl.zeros([Q], tl.float32)
            for k in tl.static_range(len(x_tiles)):
                channel = k * BP + tl.arange(0, BP)
                by_x = dot(B_tile, adjoints[k]) * kept[:, None]
                by_kept += tl.sum(by_x * x_tiles[k].to(tl.float32), 1)
                by_x = dot(scores.to(dtype), y_tiles[k], by_x * d[:, None])
                if HAS_D and BY_CHANNEL:
                    y_wide = y_tiles[k].to(tl.float32)
                    by_x += y_wide * tl.load(D + h * P + channel, mask=channel < P, other=0.0)[None, :]
                    by_skip = tl.sum(y_wide * x_tiles[k].to(tl.float32), 0)
                    tl.store(grad_D + index * P + channel, by_skip, mask=channel < P)
                store_rows(grad_x + (token * H + h) * P, by_x, step, here, H * P, channel, P)
            before = by_kept * d
            by_step = tl.cumsum(by_a, 0, reverse=True) + (tl.cumsum(before, 0) - before)
            tl.store(grad_A + M * H + index, tl.sum(by_step * d, 0))
            by_step = by_d + by_kept + by_step * rate
            by_raw = through_softplus(by_step, dt + h, token, tokens, step, bias, DT_STRIDE, SOFTPLUS)
            tl.store(grad_dt + (all_tokens + token + step) * H + h, by_raw, mask=here)
            if HAS_BIAS:
                tl.store(grad_bias + M * H + index, tl.sum(tl.where(here, by_raw, 0.0), 0))
        by_B = dot(by_BC.to(dtype), C_tile, by_B)
        store_rows(grad_B + ((split * all_tokens + token) * G + g) * N, by_B, step, here, G * N, row, N)
        by_C = dot(tl.trans(by_BC).to(dtype), B_tile)
        store_rows(grad_C + (((2 * split + 1) * all_tokens + token) * G + g) * N, by_C, step, here, G * N, row, N)
