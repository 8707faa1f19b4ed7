"""Nonlinear recurrences without mixing of channels, in Triton: the forward solve and the adjoint.

A program owns one row of the batch, BD channels, and all of the row's C chunks of L tokens: C × BD lanes, which step
through their chunks side by side. C = 1 is the sequential kernel, L = 1 would be Newton's method on every state
(ParaRNN, arXiv 2510.21450); in between it is multiple shooting on the chunks' starts:

1. Every lane guesses the state at the start of its chunk: it begins `burn_in` tokens earlier, from zero.
2. A pass steps through all chunks from their starts g_s. It gives their ends Φ_s, the products A_s of their steps'
   Jacobians, and the largest of the partial products, m_s.
3. To first order the starts err by e_s = A_{s−1} e_{s−1} + Φ_{s−1} − g_s, and the states of chunk s by m_s |e_s|. The
   solve has converged when that is within the tolerance in all lanes. Where the burn-in outlasts the channels' memory
   one pass is enough, and the test is free.
4. Else the starts move by e_s, with A cut to [−1, 1] lest far starts overshoot, and another pass follows. A pass makes
   one more chunk exact whatever A is: after `max_passes` the others are run one after another, each from the exact end
   of the one before. That is as slow as the sequential kernel, and as right.

The adjoint μ_{t−1} = J_tᵀ μ_t + dL/dh_{t−1} is linear: the same passes, from right to left, converge in two. Gates and
states are recomputed, in groups of U tokens, from the float32 states that the forward kernel left before every group;
so the gradient is exact at the trajectory, whatever type h was rounded to.

Packed documents are one row. At a document's start the state starts anew and the Jacobian is zero, so that chunks need
not respect the documents' bounds.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_affine import (
    add,
    apply,
    carry_over_rows,
    cut,
    from_row_before,
    identity,
    keep,
    largest,
    multiply,
    select,
    subtract,
    total,
    transpose,
    zeros,
)


@triton.jit
def load_rows(p, mask, D: tl.constexpr, N: tl.constexpr):
    """N rows of D numbers, as float32."""
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.load(p + i * D, mask=mask, other=0.0).to(tl.float32),)
    return out


@triton.jit
def load_group(p, left, D: tl.constexpr, G: tl.constexpr, U: tl.constexpr, EVEN: tl.constexpr):
    """G rows each of U tokens, in their own dtype, in lanes that have `left` tokens left."""
    out = ()
    for j in tl.static_range(U):
        for i in tl.static_range(G):
            out = out + (tl.load(p + (j * G + i) * D, mask=left > (0 if EVEN else j), other=0.0),)
    return out


@triton.jit
def token_of(group, bias, j: tl.constexpr, G: tl.constexpr):
    """The pre-activations of token j of a group."""
    out = ()
    for i in tl.static_range(G):
        out = out + (group[j * G + i].to(tl.float32) + bias[i],)
    return out


@triton.jit
def _next_starts(
    start, end, A, m, tolerance, lanes, row, p, max_passes, exchange,
    C: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """After p passes: the starts of the next, whether it is needed, and the largest error in the `lanes` that count."""
    exchange += tl.program_id(0).to(tl.int64) * ((K + K * K) * C * BD)
    moved = from_row_before(end + A, row, exchange, C, BD)
    if K == 1:
        arriving = (moved[0],)
        A = (moved[1],)
    else:
        arriving = (moved[0], moved[1])
        A = (moved[2], moved[3], moved[4], moved[5])
    defect = keep(row > 0, subtract(arriving, start))
    error = m * total(carry_over_rows(A, defect, K))
    converged = (tl.max(tl.where(lanes & ~(error <= tolerance), 1, 0)) == 0) & (p <= max_passes)
    better = add(start, carry_over_rows(cut(A), defect, K))
    start = select((row == p) | (p >= max_passes), arriving, better)
    return start, tl.where(converged | (p >= C), 0, 1), tl.max(tl.where(lanes, error, 0.0))


@triton.jit
def forward_kernel(
    gates,  # (B, T, G, D)
    weight,  # (P, D)
    bias,  # (G, D)
    initial,  # (S, K, D) float32
    words,
    documents,  # of packed rows: see `document_starts`
    h,  # (B, T, D)
    checkpoints,  # (B, ⌈T / U⌉, K, D) float32: the states before every group of U tokens
    final,  # (S, K, D) float32
    exchange,  # (programs, K + K², C, BD) float32: what lanes tell each other
    statistics,  # (3,) int32: see `statistics_on`
    T,
    L,  # multiple of U
    burn_in,  # multiple of U, at most L
    max_passes,
    tolerance,
    ACTIVATE: tl.constexpr,
    NEW_STATE: tl.constexpr,
    JACOBIAN: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,  # every lane has a channel and L tokens
    SAVE: tl.constexpr,  # write the checkpoints
):
    blocks: tl.constexpr = (D + BD - 1) // BD
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, C)[:, None]
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)[None, :]
    channel = d < D
    nothing = tl.zeros([C, BD], tl.float32)
    d = d + tl.zeros([C, BD], tl.int32)

    w = load_rows(weight + d, channel, D, P)
    w_bias = load_rows(bias + d, channel & HAS_BIAS, D, G)
    start = zeros(nothing, K)
    if HAS_INITIAL and not PACKED:
        start = load_rows(initial + b * K * D + d, channel & (row == 0), D, K)

    token = row.to(tl.int64) * L  # the first of each chunk
    p_gates = gates + (b * T + token) * (G * D) + d
    p_h = h + (b * T + token) * D + d
    p_check = checkpoints + (b * tl.cdiv(T, U) + token // U) * (K * D) + d
    after = T - token  # tokens from the chunk's start to the end of the row

    end = zeros(nothing, K)
    p = tl.full((), 0, tl.int32)
    running = tl.full((), 1, tl.int32)
    while running != 0:
        active = (row >= p) & ((p < max_passes) | (row == p)) & channel
        first = -burn_in * (p == 0).to(tl.int32)
        state = zeros(nothing, K)
        A = identity(nothing, K)
        m = nothing + 1.0
        following = zeros(nothing.to(gates.dtype.element_ty), U * G)
        for i in range(first - U, L, U):  # the first time round, only to load the first group
            at = tl.cast(i, tl.int64)
            if i == 0:
                start = select((row == 0) | (p > 0), start, state)
                state = start
                A = identity(nothing, K)
                m = nothing + 1.0
            group = following
            left = tl.where(active & (token + at + U >= 0) & (at + U < L), after - at - U, 0)
            following = load_group(p_gates + (at + U) * (G * D), left, D, G, U, EVEN)
            if i >= first:  # a block of its own, so that the compiler leaves the loads before it
                left = tl.where(active & (token + at >= 0), after - at, 0)
                stored = tl.where(at >= 0, left, 0)
                if SAVE:
                    for k in tl.static_range(K):
                        tl.store(p_check + (at // U * K + k) * D, state[k], mask=stored > 0)
                if PACKED:
                    inside = (token + at >= 0) & (after - at > 0)
                    word = tl.load(words + (token + at) // U, mask=inside, other=0)
                    document = tl.load(documents + (token + at) // U, mask=inside, other=0)
                for j in tl.static_range(U):
                    within = left > (0 if EVEN else j)
                    if PACKED:
                        starts = ((word >> j) & 1) != 0
                        if HAS_INITIAL:
                            fresh = load_rows(initial + document.to(tl.int64) * (K * D) + d, starts & within, D, K)
                        else:
                            fresh = zeros(nothing, K)
                        state = select(starts, fresh, state)
                        document += (word >> j) & 1
                    kept = ACTIVATE(state, token_of(group, w_bias, j, G), w)
                    if C > 1:
                        J = multiply(JACOBIAN(kept, w), A, K)
                        if PACKED:
                            J = keep(((word >> j) & 1) == 0, J)
                        A = J if EVEN else select(within, J, A)
                        m = tl.maximum(m, largest(A))
                    state = NEW_STATE(kept) if EVEN else select(within, NEW_STATE(kept), state)
                    h_j = state[K - 1].to(h.dtype.element_ty)
                    tl.store(p_h + (at + j) * D, h_j, mask=stored > (0 if EVEN else j))
                    if PACKED:
                        ends = ((word >> (j + 1)) & 1) != 0
                        p_final = final + (document - 1).to(tl.int64) * (K * D) + d
                        for k in tl.static_range(K):
                            tl.store(p_final + k * D, state[k], mask=ends & (stored > (0 if EVEN else j)))
        end = select(active, state, end)
        p += 1
        if C > 1:
            lanes = (after > 0) & channel
            start, running, error = _next_starts(
                start, end, A, m, tolerance, lanes, row, p, max_passes, exchange, C, K, BD
            )
            if (running == 0) & (p <= max_passes):
                tl.atomic_max(statistics + 1, error.to(tl.int32, bitcast=True))
        else:
            running = tl.full((), 0, tl.int32)
    if C > 1:
        tl.atomic_max(statistics, tl.minimum(p, max_passes))
        tl.atomic_add(statistics + 2, (p > max_passes).to(tl.int32))
    if not PACKED:
        for k in tl.static_range(K):
            tl.store(final + (b * K + k) * D + d, end[k], mask=channel & (row == (T - 1) // L))


@triton.jit
def backward_kernel(
    grad_h,  # (B, T, D)
    grad_final,  # (S, K, D) float32
    gates,  # as in the forward kernel
    weight,
    bias,
    initial,
    words,
    documents,
    checkpoints,
    grad_gates,  # (B, T, G, D)
    grad_weight,  # (B, P + G, D) float32: this row's share of the gradients of the weight and the bias
    grad_initial,  # (S, K, D) float32
    exchange,  # as in the forward kernel
    T,
    L,
    burn_in,
    max_passes,
    tolerance,  # relative to the largest adjoint in the program
    ACTIVATE: tl.constexpr,
    NEW_STATE: tl.constexpr,
    JACOBIAN: tl.constexpr,
    GRADIENTS: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,
):
    blocks: tl.constexpr = (D + BD - 1) // BD
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, C)[:, None]
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)[None, :]
    channel = d < D
    nothing = tl.zeros([C, BD], tl.float32)
    d = d + tl.zeros([C, BD], tl.int32)

    w = load_rows(weight + d, channel, D, P)
    w_bias = load_rows(bias + d, channel & HAS_BIAS, D, G)

    # the rows hold the chunks in the order in which the adjoint meets them
    token = (C - 1 - row).to(tl.int64) * L
    group_of = token + L - U  # the first token of each chunk's last group
    p_gates = gates + (b * T + group_of) * (G * D) + d
    p_grad = grad_h + (b * T + group_of) * D + d
    p_out = grad_gates + (b * T + group_of) * (G * D) + d
    p_check = checkpoints + (b * tl.cdiv(T, U) + group_of // U) * (K * D) + d
    after = T - group_of

    start = zeros(nothing, K)
    end = zeros(nothing, K)
    sums = zeros(nothing, P + G)
    p = tl.full((), 0, tl.int32)
    running = tl.full((), 1, tl.int32)
    while running != 0:
        active = (row >= p) & ((p < max_passes) | (row == p)) & channel
        first = -burn_in * (p == 0).to(tl.int32)
        carry = zeros(nothing, K)
        A = identity(nothing, K)
        m = nothing + 1.0
        biggest = nothing
        shares = zeros(nothing, P + G)
        u_following = zeros(nothing.to(gates.dtype.element_ty), U * G)
        g_following = zeros(nothing.to(grad_h.dtype.element_ty), U)
        check_following = zeros(nothing, K)
        for i in range(first - U, L, U):  # i tokens before the chunk's end
            at = tl.cast(i, tl.int64)
            if i == 0:
                start = keep((row > 0) | (p > 0), select(p > 0, start, carry))
                carry = start
                A = identity(nothing, K)
                m = nothing + 1.0
                biggest = nothing
                shares = zeros(nothing, P + G)
            u_group = u_following
            g_group = g_following
            state = check_following
            ahead = tl.where(active & (at + U < L), after + at + U, 0)
            u_following = load_group(p_gates - (at + U) * (G * D), ahead, D, G, U, EVEN)
            g_following = load_group(p_grad - (at + U) * D, ahead, D, 1, U, EVEN)
            check_following = load_rows(p_check - (at + U) // U * (K * D), ahead > 0, D, K)
            if i >= first:
                left = tl.where(active, after + at, 0)
                stored = tl.where(at >= 0, left, 0)
                t = group_of - at
                if PACKED:
                    inside = (t + token >= 0) & (t < T)
                    word = tl.load(words + t // U, mask=inside, other=0)
                    document = tl.load(documents + t // U, mask=inside, other=0)

                group = ()
                for j in tl.static_range(U):
                    if PACKED:
                        starts = ((word >> j) & 1) != 0
                        if HAS_INITIAL:
                            p_initial = initial + document.to(tl.int64) * (K * D) + d
                            fresh = load_rows(p_initial, starts & (left > (0 if EVEN else j)), D, K)
                        else:
                            fresh = zeros(nothing, K)
                        state = select(starts, fresh, state)
                        document += (word >> j) & 1
                    kept = ACTIVATE(state, token_of(u_group, w_bias, j, G), w)
                    state = NEW_STATE(kept)
                    group = group + (kept,)

                for j in tl.static_range(U - 1, -1, -1):
                    kept = group[j]
                    within = left > (0 if EVEN else j)
                    mu = carry
                    if HAS_FINAL:
                        if PACKED:
                            ends = ((word >> (j + 1)) & 1) != 0
                            p_final = grad_final + (document - 1).to(tl.int64) * (K * D) + d
                        else:
                            ends = t + j == T - 1
                            p_final = grad_final + b * (K * D) + d
                        mu = add(mu, load_rows(p_final, ends & within, D, K))
                    g = g_group[j].to(tl.float32)
                    mu = (mu[0] + g,) if K == 1 else (mu[0], mu[1] + g)
                    by_gates, by_weight = GRADIENTS(mu, kept, w)
                    for k in tl.static_range(G):
                        g_k = by_gates[k].to(grad_gates.dtype.element_ty)
                        tl.store(p_out - at * (G * D) + (j * G + k) * D, g_k, mask=stored > (0 if EVEN else j))
                    share = by_weight + by_gates
                    if not EVEN:
                        share = keep(within, share)
                    shares = add(shares, share)
                    J = transpose(JACOBIAN(kept, w), K)
                    new = apply(J, mu, K)
                    if PACKED:
                        starts = ((word >> j) & 1) != 0
                        if HAS_INITIAL:
                            p_initial = grad_initial + (document - 1).to(tl.int64) * (K * D) + d
                            for k in tl.static_range(K):
                                tl.store(p_initial + k * D, new[k], mask=starts & (stored > (0 if EVEN else j)))
                        new = keep(((word >> j) & 1) == 0, new)
                        document -= (word >> j) & 1
                    if C > 1:
                        J = multiply(J, A, K)
                        if PACKED:
                            J = keep(((word >> j) & 1) == 0, J)
                        A = J if EVEN else select(within, J, A)
                        m = tl.maximum(m, largest(A))
                        biggest = tl.maximum(biggest, largest(mu))
                    carry = new if EVEN else select(within, new, carry)
        end = select(active, carry, end)
        sums = select(active, shares, sums)
        p += 1
        if C > 1:
            scale = tl.max(biggest)
            start, running, _ = _next_starts(
                start, end, A, m, tolerance * scale, channel & (row >= 0), row, p, max_passes, exchange, C, K, BD
            )
        else:
            running = tl.full((), 0, tl.int32)
    for k in tl.static_range(P + G):
        share = tl.sum(sums[k], 0)
        column = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
        tl.store(grad_weight + (b * (P + G) + k) * D + column, share, mask=column < D)
    if HAS_INITIAL and not PACKED:
        for k in tl.static_range(K):
            tl.store(grad_initial + (b * K + k) * D + d, end[k], mask=channel & (row == C - 1))
