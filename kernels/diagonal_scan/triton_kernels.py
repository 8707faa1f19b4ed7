"""The diagonal linear recurrence in Triton: every number is read once and written once.

A program owns one row of the batch and BD channels, and walks along the row in blocks of C · U tokens. A block's C
chunks of U consecutive tokens lie side by side in registers, C × BD lanes, loaded while the block before is worked on:

1. Every lane steps through its chunk from zero, which gives the product A of its decays and its end E: the chunk takes
   a state s to A s + E.
2. A scan over the lanes of a channel composes these maps. Each lane carries two of them, of the chunks up to its own
   and of those before its own, so that the latter gives the state at its start without a shift from lane to lane.
3. Every lane steps through its chunk again, from that state, and writes the true states.

With C = 1, where the channels of all rows fill the device by themselves, only the third step is left.

The backward kernel does the same from right to left with μ_{t−1} = g_{t−1} + ā_t μ_t, where g = ∂loss/∂h, and writes
∂loss/∂x_t = μ_t and ∂loss/∂a_t = h̄_{t−1} μ_t. It reads the states h if they are float32. If they were rounded to
narrower types, it recomputes them from the inputs and the float32 states that the forward kernel left before every
group of U tokens.

Packed documents are one row. At a document's start the decay is taken as zero, and its share of the initial state is
added to the input; thus chunks need not respect the documents' bounds. Tokens beyond the row's ends have decay one and
input zero: they hand the state on.

Products of decays near one would be rounded in one direction: (1 − i u)(1 − j u) with u = 2⁻²⁴ loses i j u², and
10,000 tokens that a channel remembers add that up to relative errors of 1e-4. A product is therefore two numbers, what
float32 holds of it and what rounding took (Dekker's product, with fused multiply-adds).

A number is a tuple of K float32 tensors: itself, or its real and imaginary part. Complex numbers are read and written
as words of 64 bits.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_affine import add, keep, select, zeros


@triton.jit
def _numbers(raw, K: tl.constexpr):
    """What was loaded, as a number."""
    if K == 1:
        return (raw.to(tl.float32),)
    else:
        real = raw.to(tl.int32).to(tl.float32, bitcast=True)
        return (real, (raw >> 32).to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _store(p, x, mask, K: tl.constexpr):
    if K == 1:
        tl.store(p, x[0].to(p.dtype.element_ty), mask=mask)
    else:
        real = x[0].to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.store(p, (x[1].to(tl.int32, bitcast=True).to(tl.int64) << 32) | real, mask=mask)


@triton.jit
def _load(p, mask, K: tl.constexpr):
    return _numbers(tl.load(p, mask=mask, other=0), K)


@triton.jit
def _load_decay(p, mask, K: tl.constexpr):
    """In the dtype that memory holds; one where there is none."""
    if K == 1:
        return tl.load(p, mask=mask, other=1.0)
    else:
        return tl.load(p, mask=mask, other=0x3F800000)


@triton.jit
def _conjugate(x):
    if len(x) == 1:
        return x
    else:
        return (x[0], -x[1])


@triton.jit
def _times(x, y):
    if len(x) == 1:
        return (x[0] * y[0],)
    else:
        return (x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0])


@triton.jit
def _rounded(x, y):
    """x · y, and what rounding took from it. A multiply-add keeps the compiler from fusing a product into a sum, whose
    error would be another one."""
    if len(x) == 1:
        product = x[0] * y[0]
        return (product,), (tl.fma(x[0], y[0], -product),)
    else:
        nothing = tl.zeros_like(x[0] + y[0])
        p = tl.fma(x[0], y[0], nothing)
        q = tl.fma(x[1], y[1], nothing)
        r = tl.fma(x[0], y[1], nothing)
        s = tl.fma(x[1], y[0], nothing)
        real = p - q
        imaginary = r + s
        lost_real = _lost(p, -q, real) + tl.fma(x[0], y[0], -p) - tl.fma(x[1], y[1], -q)
        lost_imaginary = _lost(r, s, imaginary) + tl.fma(x[0], y[1], -r) + tl.fma(x[1], y[0], -s)
        return (real, imaginary), (lost_real, lost_imaginary)


@triton.jit
def _lost(x, y, total):
    """What rounding took from x + y (Knuth)."""
    of_y = total - x
    return (x - (total - of_y)) + (y - of_y)


@triton.jit
def _times_product(b, b_lost, a, a_lost):
    """The product of two products, and what rounding took from it."""
    product, lost = _rounded(b, a)
    return product, add(lost, add(_times(b, a_lost), _times(b_lost, a)))


@triton.jit
def _apply(A, lost, state, E):
    """A state + E."""
    return add(_times(A, state), add(_times(lost, state), E))


@triton.jit
def _one(like, K: tl.constexpr):
    if K == 1:
        return (like + 1.0,)
    else:
        return (like + 1.0, like)


@triton.jit
def _then1(a, a_lost, e, before, before_lost, e_before, b, b_lost, f, b_before, b_before_lost, f_before):
    A, lost = _times_product((b,), (b_lost,), (a,), (a_lost,))
    E = _apply((b,), (b_lost,), (e,), (f,))
    A_before, lost_before = _times_product((b_before,), (b_before_lost,), (a,), (a_lost,))
    E_before = _apply((b_before,), (b_before_lost,), (e,), (f_before,))
    return A[0], lost[0], E[0], A_before[0], lost_before[0], E_before[0]


@triton.jit
def _then2(
    a0, a1, a_lost0, a_lost1, e0, e1, before0, before1, before_lost0, before_lost1, e_before0, e_before1,
    b0, b1, b_lost0, b_lost1, f0, f1, b_before0, b_before1, b_before_lost0, b_before_lost1, f_before0, f_before1,
):  # fmt: skip
    a, a_lost, e = (a0, a1), (a_lost0, a_lost1), (e0, e1)
    b, b_lost = (b0, b1), (b_lost0, b_lost1)
    b_before, b_before_lost = (b_before0, b_before1), (b_before_lost0, b_before_lost1)
    A, lost = _times_product(b, b_lost, a, a_lost)
    E = _apply(b, b_lost, e, (f0, f1))
    A_before, lost_before = _times_product(b_before, b_before_lost, a, a_lost)
    E_before = _apply(b_before, b_before_lost, e, (f_before0, f_before1))
    return (
        A[0], A[1], lost[0], lost[1], E[0], E[1],
        A_before[0], A_before[1], lost_before[0], lost_before[1], E_before[0], E_before[1],
    )  # fmt: skip


@triton.jit
def _starts(state, A, lost, E, K: tl.constexpr):
    """The states (C, BD) at the chunks' starts; `state` (1, BD) is the first, and chunks take s to (A + lost) s + E.

    The maps before a chunk: the lane's own are the identity, and `_then` composes the right one's with all of the left.
    """
    nothing = tl.zeros_like(A[0])
    if K == 1:
        own = (A[0], lost[0], E[0], nothing + 1.0, nothing, nothing)
        _, _, _, a, a_lost, e = tl.associative_scan(own, 0, _then1)
        return _apply((a,), (a_lost,), state, (e,))
    else:
        own = A + lost + E + (nothing + 1.0, nothing, nothing, nothing, nothing, nothing)
        _, _, _, _, _, _, a0, a1, a_lost0, a_lost1, e0, e1 = tl.associative_scan(own, 0, _then2)
        return _apply((a0, a1), (a_lost0, a_lost1), state, (e0, e1))


@triton.jit
def _last_row(x, row, C: tl.constexpr):
    """(C, BD) → (1, BD)."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (tl.sum(tl.where(row == C - 1, x[i], 0.0), 0)[None, :],)
    return out


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x,  # (B, T, D)
    a,  # (B, T, D) or (D,)
    initial,  # (S, D) float32 or complex64
    words,
    documents,  # of packed rows: see `document_starts`
    h,  # (B, T, D)
    checkpoints,  # (B, ⌈T / U⌉, D) float32: the states before every group of U tokens
    final,  # (S, D) float32 or complex64
    T,
    D: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
    CONSTANT: tl.constexpr,  # a is (D,)
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE: tl.constexpr,  # write the checkpoints
    EVEN: tl.constexpr,  # every lane always has a channel and U tokens
):
    blocks: tl.constexpr = (D + BD - 1) // BD
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, C)[:, None]
    column = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)[None, :]
    inside = column < D
    of_row = b * D + column  # in the initial and the final states
    nothing = tl.zeros([C, BD], tl.float32)
    d = column + tl.zeros([C, BD], tl.int32)
    room = tl.where(d < D, T, 0)  # tokens of a lane's channel

    state = zeros(tl.zeros([1, BD], tl.float32), K)
    if HAS_INITIAL and not PACKED:
        state = _load(initial + of_row, inside, K)
    if CONSTANT:
        decay = _load(a + d, d < D, K)

    groups = tl.cdiv(T, U)
    token = row.to(tl.int64) * U
    p_x = x + (b * T + token) * D + d
    p_a = a + (b * T + token) * D + d
    p_h = h + (b * T + token) * D + d
    p_check = checkpoints + (b * groups + row) * D + d

    x_following = zeros(tl.zeros([C, BD], x.dtype.element_ty), U)
    a_following = zeros(tl.zeros([C, BD], a.dtype.element_ty), 0 if CONSTANT else U)
    word_following = tl.zeros([C, 1], tl.int32)
    document_following = tl.zeros([C, 1], tl.int32)
    for i in range(-C * U, T, C * U):  # the first time round, only to load the first block
        at = tl.cast(i, tl.int64)
        x_group = x_following
        a_group = a_following
        word = word_following
        document = document_following
        ahead = room - (at + C * U + token)
        x_following = ()
        a_following = ()
        for j in tl.static_range(U):
            there = ahead > (0 if EVEN else j)
            x_following = x_following + (tl.load(p_x + (at + C * U + j) * D, mask=there, other=0),)
            if not CONSTANT:
                a_following = a_following + (_load_decay(p_a + (at + C * U + j) * D, there, K),)
        if PACKED:
            group = (at + C * U) // U + row
            word_following = tl.load(words + group, mask=group < groups, other=0)
            document_following = tl.load(documents + group, mask=group < groups, other=0)
        if i >= 0:  # a block of its own, so that the compiler leaves the loads before it
            left = room - (at + token)
            xs = ()
            decays = ()
            starting = document
            for j in tl.static_range(U):
                within = left > (0 if EVEN else j)
                x_j = _numbers(x_group[j], K)
                if CONSTANT:
                    a_j = decay if EVEN else select(within, decay, _one(nothing, K))
                else:
                    a_j = _numbers(a_group[j], K)
                if PACKED:
                    starts = ((word >> j) & 1) != 0
                    if HAS_INITIAL:
                        fresh = _load(initial + starting.to(tl.int64) * D + d, starts & within, K)
                        x_j = add(x_j, _times(a_j, fresh))
                        starting += (word >> j) & 1
                    a_j = keep(((word >> j) & 1) == 0, a_j)
                xs = xs + x_j
                decays = decays + a_j
            start = state
            if C > 1:
                A = _one(nothing, K)
                lost = zeros(nothing, K)
                E = zeros(nothing, K)
                for j in tl.static_range(U):
                    a_j = decays[j * K : j * K + K]
                    E = add(_times(a_j, E), xs[j * K : j * K + K])
                    A, lost = _times_product(a_j, zeros(nothing, K), A, lost)
                start = _starts(state, A, lost, E, K)
            if SAVE:
                _store(p_check + at // U * D, start, left > 0, K)
            for j in tl.static_range(U):
                start = add(_times(decays[j * K : j * K + K], start), xs[j * K : j * K + K])
                within = left > (0 if EVEN else j)
                _store(p_h + (at + j) * D, start, within, K)
                if PACKED:
                    document += (word >> j) & 1
                    ends = ((word >> (j + 1)) & 1) != 0
                    _store(final + (document - 1).to(tl.int64) * D + d, start, ends & within, K)
            if C > 1:
                state = _last_row(start, row, C)
            else:
                state = start
    if not PACKED:
        _store(final + of_row, state, inside, K)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    grad_h,  # (B, T, D)
    grad_final,  # (S, D) float32 or complex64
    states,  # (B, T, D): x with checkpoints, else h
    a,  # as in the forward kernel
    initial,
    words,
    documents,
    checkpoints,
    grad_x,  # (B, T, D)
    grad_a,  # (B, T, D), or (B, D) float32 or complex64: this row's share
    grad_initial,  # (S, D) float32 or complex64
    T,
    D: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
    CONSTANT: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    SAVED: tl.constexpr,  # there are checkpoints
    EVEN: tl.constexpr,
):
    blocks: tl.constexpr = (D + BD - 1) // BD
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, C)[:, None]
    column = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)[None, :]
    inside = column < D
    of_row = b * D + column
    nothing = tl.zeros([C, BD], tl.float32)
    d = column + tl.zeros([C, BD], tl.int32)
    channel = d < D

    carry = zeros(tl.zeros([1, BD], tl.float32), K)
    if HAS_FINAL and not PACKED:
        carry = _load(grad_final + of_row, inside, K)
    if CONSTANT:
        decay = _load(a + d, channel, K)
    sums = zeros(nothing, K)

    # the rows hold the chunks in the order in which the adjoint meets them
    groups = tl.cdiv(T, U)
    last = (groups - 1 - row).to(tl.int64)  # the group of each chunk in the first block
    place = (b * T + last * U) * D + d
    p_grad = grad_h + place
    p_states = states + place
    p_a = a + place
    p_x = grad_x + place
    p_out = grad_a + place
    p_check = checkpoints + (b * groups + last) * D + d

    g_following = zeros(tl.zeros([C, BD], grad_h.dtype.element_ty), U)
    s_following = zeros(tl.zeros([C, BD], states.dtype.element_ty), U)
    a_following = zeros(tl.zeros([C, BD], a.dtype.element_ty), 0 if CONSTANT else U)
    check_following = nothing
    word_following = tl.zeros([C, 1], tl.int32)
    document_following = tl.zeros([C, 1], tl.int32)
    for i in range(-C * U, T, C * U):  # how many tokens back
        at = tl.cast(i, tl.int64)
        g_group = g_following
        s_group = s_following
        a_group = a_following
        check = check_following
        word = word_following
        document = document_following
        t = last * U - (at + C * U)
        ahead = tl.where(channel & (t >= 0), T - t, 0)
        g_following = ()
        s_following = ()
        a_following = ()
        for j in tl.static_range(U):
            there = ahead > (0 if EVEN else j)
            back = (j - at - C * U) * D
            g_following = g_following + (tl.load(p_grad + back, mask=there, other=0),)
            if SAVED:
                s_following = s_following + (tl.load(p_states + back, mask=there, other=0),)
            else:  # of the token before
                earlier = there & (t + j > 0) if j == 0 else there
                s_following = s_following + (tl.load(p_states + back - D, mask=earlier, other=0),)
            if not CONSTANT:
                a_following = a_following + (_load_decay(p_a + back, there, K),)
        if SAVED:
            check_following = tl.load(p_check - (at // U + C) * D, mask=ahead > 0, other=0)
        if PACKED:
            word_following = tl.load(words + t // U, mask=t >= 0, other=0)
            document_following = tl.load(documents + t // U, mask=t >= 0, other=0)
        if i >= 0:  # a block of its own, so that the compiler leaves the loads before it
            t = last * U - at
            left = tl.where(channel & (t >= 0), T - t, 0)
            grads = ()
            decays = ()
            befores = ()
            state = zeros(nothing, K)
            if SAVED:
                state = (check,)
            for j in tl.static_range(U):
                within = left > (0 if EVEN else j)
                g_j = _numbers(g_group[j], K)
                if CONSTANT:
                    a_j = decay if EVEN else select(within, decay, _one(nothing, K))
                else:
                    a_j = _numbers(a_group[j], K)
                if not SAVED:
                    state = _numbers(s_group[j], K)
                    if HAS_INITIAL and not PACKED:
                        if j == 0:
                            state = add(state, _load(initial + b * D + d, channel & (t == 0), K))
                if PACKED:
                    begins = ((word >> j) & 1) != 0
                    state = keep(((word >> j) & 1) == 0, state)
                    if HAS_INITIAL:
                        fresh = _load(initial + document.to(tl.int64) * D + d, begins & within, K)
                        state = add(state, fresh)
                    document += (word >> j) & 1
                    if HAS_FINAL:
                        ends = ((word >> (j + 1)) & 1) != 0
                        p_final = grad_final + (document - 1).to(tl.int64) * D + d
                        g_j = add(g_j, _load(p_final, ends & within, K))
                grads = grads + g_j
                decays = decays + _conjugate(a_j)
                befores = befores + state
                if SAVED:
                    state = add(_times(a_j, state), _numbers(s_group[j], K))
            mu = carry
            if C > 1:
                A = _one(nothing, K)
                lost = zeros(nothing, K)
                E = zeros(nothing, K)
                for j in tl.static_range(U - 1, -1, -1):
                    a_j = decays[j * K : j * K + K]
                    if PACKED:
                        a_j = keep(((word >> j) & 1) == 0, a_j)
                    E = _times(a_j, add(grads[j * K : j * K + K], E))
                    A, lost = _times_product(a_j, zeros(nothing, K), A, lost)
                mu = _starts(carry, A, lost, E, K)
            for j in tl.static_range(U - 1, -1, -1):
                within = left > (0 if EVEN else j)
                mu = add(mu, grads[j * K : j * K + K])
                back = (j - at) * D
                _store(p_x + back, mu, within, K)
                by_a = _times(_conjugate(befores[j * K : j * K + K]), mu)
                if CONSTANT:
                    sums = add(sums, by_a if EVEN else keep(within, by_a))
                else:
                    _store(p_out + back, by_a, within, K)
                mu = _times(decays[j * K : j * K + K], mu)
                if PACKED:
                    begins = ((word >> j) & 1) != 0
                    if HAS_INITIAL:
                        _store(grad_initial + (document - 1).to(tl.int64) * D + d, mu, begins & within, K)
                    mu = keep(((word >> j) & 1) == 0, mu)
                    document -= (word >> j) & 1
            if C > 1:
                carry = _last_row(mu, row, C)
            else:
                carry = mu
    if HAS_INITIAL and not PACKED:
        _store(grad_initial + of_row, carry, inside, K)
    if CONSTANT:
        total = ()
        for k in tl.static_range(K):
            total = total + (tl.sum(sums[k], 0)[None, :],)
        _store(grad_a + of_row, total, inside, K)
