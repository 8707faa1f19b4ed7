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
Here dt is Δ; its gradient goes on through the softplus in the end.

All of this is more than the registers of a program hold, if others are to share its multiprocessor and compute while it
waits for memory. Four programs share a chunk: one has what is read from the state at its start, diag(eᵃ) dY H; one what
is written into the state, diag(s dt) X dH; one dCB and what it gives; one dX. They run side by side, so that what
several load is loaded once. The vectors that make up ddt are put together by `steps_backward_kernel`.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk, sequence
from riverrun.kernels.common.triton_math import dot, exp
from riverrun.kernels.ssd.triton_forward import load_rows, load_state, load_steps, store_rows, store_state


@triton.jit
def states_kernel(
    x,  # (B, T, H, P), or dY
    steps,  # (M, H, Q) float32: Δ
    decays,  # (M, H, Q) float32: a
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
    B_STRIDE: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
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
    if HAS_FIRST:
        state = load_state(first_state + place, row, channel, N, P)
    else:
        state = tl.zeros([BN, BP], tl.float32)
    left = 1.0
    last = (tl.cdiv(tokens, Q) - 1) * Q
    for done in tl.range(0, tokens, Q, num_stages=STAGES):
        at = last - done if BACKWARD else done
        token = begin + at
        here = step < tokens - at
        if KEEP_STATES:
            store_rows(states + ((c + at // Q) * H + h) * N * P, state, row, row < N, P, channel, P)
        x_tile = load_rows(x + token * X_STRIDE + h * P, step, here, X_STRIDE, channel, P)
        B_tile = load_rows(B + token * B_STRIDE + g * N, step, here, B_STRIDE, row, N)
        d, a, end = load_steps(steps, decays, ((c + at // Q) * H + h) * Q, step, Q)
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


@triton.jit
def gradients_kernel(
    grad_y,  # (B, T, H, P)
    x,  # (B, T, H, P)
    steps,  # (M, H, Q) float32: Δ
    decays,  # (M, H, Q) float32: a
    B,  # (B, T, G, N)
    C,  # (B, T, G, N)
    D,  # (H,) or (H, P) float32
    states,  # (M, H, N, P)
    grad_states,  # (M, H, N, P)
    grad_x,  # (B, T, H, P)
    by_read,  # (M, H, Q) float32: the gradients that `steps_backward_kernel` puts together
    flow,  # (M, H) float32
    by_a,  # (M, H, Q) float32
    by_d,  # (M, H, Q) float32
    by_written,  # (M, H, Q) float32
    grad_B,  # (splits, 2, B, T, G, N) float32
    grad_C,  # (splits, 2, B, T, G, N) float32
    grad_D,  # (M, H) or (M, H, P) float32
    start,
    length,
    T,
    all_tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    X_STRIDE: tl.constexpr,  # from token to token
    B_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    HAS_D: tl.constexpr,
    BY_CHANNEL: tl.constexpr,  # D is (H, P)
    PACKED: tl.constexpr,
    READ_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    part, c = tl.program_id(0) % 4, tl.program_id(0) // 4 // (H // HEADS)
    first_head = tl.program_id(0) // 4 % (H // HEADS) * HEADS
    g, split = first_head // (H // G), (first_head % (H // G) // HEADS).to(tl.int64)
    row, step = tl.arange(0, BN), tl.arange(0, Q)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    here = step < tokens
    place = ((2 * split * all_tokens + token) * G + g) * N
    if tokens > 0 and part == 0:
        C_tile = load_rows(C + token * C_STRIDE + g * N, step, here, C_STRIDE, row, N)
        by_C = tl.zeros([Q, BN], tl.float32)
        for i in tl.range(0, HEADS, num_stages=READ_STAGES):
            h = first_head + i
            index = tl.cast(c, tl.int64) * H + h
            a = tl.load(decays + index * Q + step)
            of_a = tl.zeros([Q], tl.float32)
            through = tl.zeros([BP], tl.float32)
            for p_start in tl.static_range(0, P, BP):
                channel = p_start + tl.arange(0, BP)
                y_tile = load_rows(grad_y + (token * H + h) * P, step, here, H * P, channel, P)
                state = load_rows(states + index * N * P, row, row < N, P, channel, P)
                adjoint = load_rows(grad_states + index * N * P, row, row < N, P, channel, P)
                through += tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), 0)
                read = y_tile.to(tl.float32) * exp(a)[:, None]
                of_a += tl.sum(dot(C_tile, state) * read, 1)
                by_C = dot(read.to(dtype), tl.trans(state), by_C)
            tl.store(by_read + index * Q + step, of_a)
            tl.store(flow + index, tl.sum(through, 0))
        store_rows(grad_C + place, by_C, step, here, G * N, row, N)
    elif tokens > 0 and part == 1:
        by_B = tl.zeros([Q, BN], tl.float32)
        for i in tl.range(0, HEADS, num_stages=READ_STAGES):
            h = first_head + i
            index = tl.cast(c, tl.int64) * H + h
            d, a, end = load_steps(steps, decays, index * Q, step, Q)
            for p_start in tl.static_range(0, P, BP):
                channel = p_start + tl.arange(0, BP)
                x_tile = load_rows(x + token * X_STRIDE + h * P, step, here, X_STRIDE, channel, P)
                adjoint = load_rows(grad_states + index * N * P, row, row < N, P, channel, P)
                written = x_tile.to(tl.float32) * (d * exp(end - a))[:, None]
                by_B = dot(written.to(dtype), tl.trans(adjoint), by_B)
        store_rows(grad_B + place, by_B, step, here, G * N, row, N)
    elif tokens > 0:
        # matrices of tokens are transposed: rows j are what is written, columns i ≥ j what is read
        B_tile = load_rows(B + token * B_STRIDE + g * N, step, here, B_STRIDE, row, N)
        C_tile = load_rows(C + token * C_STRIDE + g * N, step, here, C_STRIDE, row, N)
        BC = tl.where(step[:, None] <= step[None, :], dot(B_tile, tl.trans(C_tile)), 0.0).to(dtype)
        if part == 2:
            by_BC = tl.zeros([Q, Q], tl.float32)
            for i in tl.range(0, HEADS, num_stages=STAGES):
                h = first_head + i
                index = tl.cast(c, tl.int64) * H + h
                d, a, _ = load_steps(steps, decays, index * Q, step, Q)
                xy = tl.zeros([Q, Q], tl.float32)
                for p_start in tl.static_range(0, P, BP):
                    channel = p_start + tl.arange(0, BP)
                    x_tile = load_rows(x + token * X_STRIDE + h * P, step, here, X_STRIDE, channel, P)
                    y_tile = load_rows(grad_y + (token * H + h) * P, step, here, H * P, channel, P)
                    xy = dot(x_tile, tl.trans(y_tile), xy)
                    if HAS_D and BY_CHANNEL:
                        by_skip = tl.sum(x_tile.to(tl.float32) * y_tile.to(tl.float32), 0)
                        tl.store(grad_D + index * P + channel, by_skip, mask=channel < P)
                if HAS_D and not BY_CHANNEL:
                    by_skip = tl.sum(tl.where(step[:, None] == step[None, :], xy, 0.0), 1)
                    tl.store(grad_D + index, tl.sum(by_skip, 0))
                xy *= exp(tl.minimum(a[None, :] - a[:, None], 0.0))
                by_BC += xy * d[:, None]
                xy *= BC.to(tl.float32)
                tl.store(by_d + index * Q + step, tl.sum(xy, 1))
                xy = tl.where(step[:, None] < step[None, :], xy * d[:, None], 0.0)
                tl.store(by_a + index * Q + step, tl.sum(xy, 0) - tl.sum(xy, 1))
            by_BC = tl.where(step[:, None] <= step[None, :], by_BC, 0.0).to(dtype)
            place += all_tokens * G * N
            store_rows(grad_C + place, dot(tl.trans(by_BC), B_tile), step, here, G * N, row, N)
            C_tile = load_rows(C + token * C_STRIDE + g * N, step, here, C_STRIDE, row, N)
            store_rows(grad_B + place, dot(by_BC, C_tile), step, here, G * N, row, N)
        else:
            for i in tl.range(0, HEADS, num_stages=STAGES):
                h = first_head + i
                index = tl.cast(c, tl.int64) * H + h
                d, a, end = load_steps(steps, decays, index * Q, step, Q)
                scores = BC.to(tl.float32) * exp(tl.minimum(a[None, :] - a[:, None], 0.0)) * d[:, None]
                if HAS_D and not BY_CHANNEL:
                    scores += tl.where(step[:, None] == step[None, :], tl.load(D + h), 0.0)
                scores = scores.to(dtype)
                kept = exp(end - a)
                by_kept = tl.zeros([Q], tl.float32)
                for p_start in tl.static_range(0, P, BP):
                    channel = p_start + tl.arange(0, BP)
                    adjoint = load_rows(grad_states + index * N * P, row, row < N, P, channel, P)
                    y_tile = load_rows(grad_y + (token * H + h) * P, step, here, H * P, channel, P)
                    by_x = dot(B_tile, adjoint) * kept[:, None]
                    x_tile = load_rows(x + token * X_STRIDE + h * P, step, here, X_STRIDE, channel, P)
                    by_kept += tl.sum(by_x * x_tile.to(tl.float32), 1)
                    by_x = dot(scores, y_tile, by_x * d[:, None])
                    if HAS_D and BY_CHANNEL:
                        skip = tl.load(D + h * P + channel, mask=channel < P, other=0.0)
                        by_x += y_tile.to(tl.float32) * skip[None, :]
                    store_rows(grad_x + (token * H + h) * P, by_x, step, here, H * P, channel, P)
                tl.store(by_written + index * Q + step, by_kept)
