"""Depthwise causal convolution over time in Triton: every input is read once, every output written once.

A program owns BD channels of one *lane*, a stretch of tokens of one row, and steps through it with the last W − 1
inputs in registers, U tokens loaded at a time. It reads the W − 1 inputs before its first token itself: lanes are
independent of each other.

The backward kernel steps the same way. It computes the input of the SiLU again, and with it g_t, the gradient of that
input; and it keeps W − 1 pending sums: token t adds w_{W−1−k} g_t to the gradient of x_{t−k}, unless a sequence starts
between the two, and completes that of x_{t−W+1}. So a lane runs W − 1 tokens further than those it owns.

What is special near the bounds of a sequence is decided once for each group of U tokens, alike for all channels: most
groups lie inside, with all the inputs that they reach, and need no mask. Those at an edge look up, for each token, its
sequence and the distances to the sequence's ends: rows of a batch know them, packed documents have them in a table
(`document_positions`). What is carried from token to token is inputs and sums only: no load waits for another.

Where outputs are scaled to unit length, a program owns whole units, for whose sums a few threads meet at every token. A
unit of a number of channels that is no power of 2 is padded to one; the places too many are channel D, which is masked
everywhere.

Numbers of tokens and documents are not specialised on: they change from batch to batch, and none is part of a stride.
"""

import triton
import triton.language as tl

from riverrun.kernels.causal_conv1d.reference import UNIT_EPS
from riverrun.kernels.common.triton_math import sigmoid

EPS = tl.constexpr(UNIT_EPS)


@triton.jit
def _channels(D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, UNIT_P: tl.constexpr):
    """Which lane, or sequence, this program is of, and its channels d."""
    width: tl.constexpr = D // UNIT * UNIT_P if UNIT else D
    columns: tl.constexpr = (width + BD - 1) // BD
    d = (tl.program_id(0) % columns) * BD + tl.arange(0, BD)
    if UNIT != UNIT_P:
        d = tl.where(d % UNIT_P < UNIT, d // UNIT_P * UNIT + d % UNIT_P, D)
    return tl.program_id(0) // columns, d


@triton.jit
def _only_if(condition, d, D: tl.constexpr):
    """Which of the channels d there are; none unless the scalar `condition` holds. (In the interpreter a vector & a
    scalar is no mask.)"""
    return d < tl.where(condition, D, 0)


@triton.jit
def _taps(weight, bias, d, D: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The W columns of the weight, oldest tap first, and the bias; (BD,) each."""
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + k, mask=d < D, other=0.0).to(tl.float32),)
    if HAS_BIAS:
        offset = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    else:
        offset = tl.zeros(d.shape, tl.float32)
    return taps, offset


@triton.jit
def _place(positions, b, t, T, PACKED: tl.constexpr):
    """The sequence of token t of row b, how many of its tokens lie before, and how many from here on; zeros beyond the
    row."""
    within = t < T
    if PACKED:
        p = positions + t
        s = tl.load(p, mask=within, other=0)
        return s, tl.load(p + T, mask=within, other=0), tl.load(p + T * 2, mask=within, other=0)
    else:
        return b, tl.where(within, t, 0), tl.where(within, T - t, 0)


@triton.jit
def _window_before(p, stride, t, d, D: tl.constexpr, W: tl.constexpr):
    """The W − 1 inputs before token t of a row, which is at `p`, oldest first, of whatever sequences."""
    window = ()
    for k in tl.static_range(W - 1):
        back = W - 1 - k
        window = window + (tl.load(p - back * stride, mask=_only_if(t >= back, d, D), other=0.0).to(tl.float32),)
    return window


@triton.jit
def _own(window, initial, s, since, d, D: tl.constexpr, W: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """The window of token number `since` of sequence s: the initial state in place of what lies before the sequence."""
    out = ()
    for k in tl.static_range(W - 1):
        own = since >= W - 1 - k
        before = 0.0
        if HAS_INITIAL:
            state = initial + (s.to(tl.int64) * (W - 1) + since + k) * D + d
            before = tl.load(state, mask=_only_if(since < W - 1 - k, d, D), other=0.0).to(tl.float32)
        out = out + (tl.where(own, window[k], before),)
    return out


@triton.jit
def _load_tokens(p, stride, left, d, D: tl.constexpr, U: tl.constexpr):
    """The next U tokens, in their own dtype, of lanes that have `left` tokens left."""
    out = ()
    for j in tl.static_range(U):
        out = out + (tl.load(p + j * stride, mask=_only_if(left > j, d, D), other=0.0),)
    return out


@triton.jit
def _convolve(window, x, taps, offset, W: tl.constexpr):
    z = x * taps[W - 1] + offset
    for k in tl.static_range(W - 1):
        z += window[k] * taps[k]
    return z


@triton.jit
def _push(window, x, W: tl.constexpr):
    """The window one token later."""
    out = ()
    for k in tl.static_range(1, W - 1):
        out = out + (window[k],)
    if W > 1:
        out = out + (x,)
    return out


@triton.jit
def _sums(x, UNIT_P: tl.constexpr):
    """Over each unit's channels, for every one of them."""
    units = tl.reshape(x, [x.shape[0] // UNIT_P, UNIT_P])
    return tl.reshape(tl.broadcast_to(tl.sum(units, 1, keep_dims=True), units.shape), x.shape)


@triton.jit
def _activate(z, SILU: tl.constexpr, UNIT_P: tl.constexpr):
    """What comes out, of what the taps sum to."""
    if SILU:
        z *= sigmoid(z)
    if UNIT_P:
        z *= tl.rsqrt(_sums(z * z, UNIT_P) + EPS)
    return z


@triton.jit
def _through_activation(g, z, SILU: tl.constexpr, UNIT_P: tl.constexpr):
    """The gradient g of what comes out → that of what the taps sum to, z. For y = u / r, r² = Σ u² + ε, it is that of
    u, (g − y Σ g y) / r, first."""
    s = sigmoid(z) if SILU else 1.0
    if UNIT_P:
        u = z * s
        scale = tl.rsqrt(_sums(u * u, UNIT_P) + EPS)
        u *= scale
        g = scale * (g - u * _sums(g * u, UNIT_P))
    if SILU:
        g *= s * (1.0 + z * (1.0 - s))
    return g


@triton.jit
def _bounds(cu_seqlens, s, T, PACKED: tl.constexpr):
    """The first token of sequence s in the flattened batch, and its length, both int64."""
    if PACKED:
        first = tl.load(cu_seqlens + s).to(tl.int64)
        length = tl.load(cu_seqlens + s + 1).to(tl.int64) - first
    else:
        first = s.to(tl.int64) * T
        length = first * 0 + T
    return first, length


@triton.jit
def _store_final(
    x, stride, initial, cu_seqlens, final, s, d, T,
    D: tl.constexpr, W: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last W − 1 inputs of sequence s, reaching back into its initial state."""
    first, length = _bounds(cu_seqlens, s, T, PACKED)
    p_state = s.to(tl.int64) * ((W - 1) * D) + d
    for k in tl.static_range(W - 1):
        t = length - (W - 1) + k
        state = tl.load(x + (first + t) * stride + d, mask=_only_if(t >= 0, d, D), other=0.0)
        if HAS_INITIAL:
            p_before = initial + p_state + (length + k) * D
            state = tl.where(t >= 0, state, tl.load(p_before, mask=_only_if(t < 0, d, D), other=0.0))
        tl.store(final + p_state + k * D, state, mask=d < D)


@triton.jit(do_not_specialize=["T", "length", "lanes"])
def forward_kernel(
    x,  # (B·T, D), rows `stride` apart
    weight,  # (D, W)
    bias,  # (D,)
    initial,  # (S, W − 1, D)
    cu_seqlens,  # (S + 1,), of packed documents
    positions,  # (3, T), of packed documents
    y,  # (B, T, D)
    final,  # (S, W − 1, D)
    T,
    stride,
    length,  # tokens of a lane, multiple of U
    lanes,  # of all rows; the programs after them write the final states
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,  # channels that are scaled to unit length together; 0: none are
    UNIT_P: tl.constexpr,  # the least power of 2 from there
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
):
    lane, d = _channels(D, BD, UNIT, UNIT_P)
    if lane < lanes:
        taps, offset = _taps(weight, bias, d, D, W, HAS_BIAS)
        chunks = tl.cdiv(T, length)
        b = lane // chunks
        t = (lane % chunks) * length
        left = T - t  # tokens to the end of the row
        token = b.to(tl.int64) * T + t
        p_x = x + token * stride + d
        p_y = y + token * D + d
        window = _window_before(p_x, stride, t, d, D, W)
        for _ in range(0, length, U):
            group = _load_tokens(p_x, stride, left, d, D, U)
            _, since, _ = _place(positions, b, t + U - 1, T, PACKED)
            if since >= U + W - 2:
                for j in tl.static_range(U):
                    x_t = group[j].to(tl.float32)
                    z = _convolve(window, x_t, taps, offset, W)
                    z = _activate(z, SILU, UNIT_P)
                    tl.store(p_y + j * D, z.to(y.dtype.element_ty), mask=d < D)
                    window = _push(window, x_t, W)
            else:
                for j in range(tl.minimum(U, left)):
                    s, since, _ = _place(positions, b, t + j, T, PACKED)
                    x_t = tl.load(p_x + j * stride, mask=d < D, other=0.0).to(tl.float32)
                    z = _convolve(_own(window, initial, s, since, d, D, W, HAS_INITIAL), x_t, taps, offset, W)
                    z = _activate(z, SILU, UNIT_P)
                    tl.store(p_y + j * D, z.to(y.dtype.element_ty), mask=d < D)
                    window = _push(window, x_t, W)
            p_x += U * stride
            p_y += U * D
            t += U
            left -= U
    else:
        _store_final(x, stride, initial, cu_seqlens, final, lane - lanes, d, T, D, W, HAS_INITIAL, PACKED)


@triton.jit
def _add_sums(sums, counted, own, x_t, W: tl.constexpr):
    """One token's share of the gradients of the W taps, oldest first, and of the bias."""
    out = ()
    for k in tl.static_range(W - 1):
        out = out + (sums[k] + counted * own[k],)
    return out + (sums[W - 1] + counted * x_t, sums[W] + counted)


@triton.jit
def _add_pending(pending, by_x, g, since, taps, W: tl.constexpr, EDGE: tl.constexpr):
    """What token number `since` of its sequence gives to the inputs before it, beside `by_x` for its own: the sums that
    are still pending, and the one that is now complete."""
    shifted = (by_x,)
    for k in tl.static_range(1, W):
        reaching = tl.where(since >= k, g, 0.0) if EDGE else g
        shifted = shifted + (pending[k - 1] + reaching * taps[W - 1 - k],)
    out = ()
    for k in tl.static_range(W - 1):
        out = out + (shifted[k],)
    return out, shifted[W - 1]


@triton.jit(do_not_specialize=["T", "steps"])
def backward_kernel(
    grad_y,  # (B·T, D), rows `grad_stride` apart
    grad_final,  # (S, W − 1, D)
    x,  # as in the forward kernel
    weight,
    bias,
    initial,
    positions,
    grad_x,  # (B, T, D)
    shares,  # (lanes, W + 1, D) float32: each lane's share of the gradients of weight and bias
    T,
    grad_stride,
    stride,
    steps,  # tokens that a lane runs through, multiple of U; it owns the first `steps` − (W − 1)
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
):
    lane, d = _channels(D, BD, UNIT, UNIT_P)
    taps, offset = _taps(weight, bias, d, D, W, HAS_BIAS)

    owned = steps - (W - 1)
    chunks = tl.cdiv(T, owned)
    b = lane // chunks
    begin = (lane % chunks) * owned
    end = tl.minimum(begin + owned, T)
    t = begin
    left = T - t  # tokens to the end of the row
    token = b.to(tl.int64) * T + t
    p_x = x + token * stride + d
    p_grad = grad_y + token * grad_stride + d
    p_out = grad_x + (token - (W - 1)) * D + d
    window = _window_before(p_x, stride, t, d, D, W)
    nothing = tl.zeros([BD], tl.float32)
    pending = ()  # of the tokens 1, 2, …, W − 1 before
    for _ in tl.static_range(W - 1):
        pending = pending + (nothing,)
    sums = ()
    for _ in tl.static_range(W + 1):
        sums = sums + (nothing,)
    for _ in range(0, steps, U):
        group = _load_tokens(p_x, stride, left, d, D, U)
        grads = _load_tokens(p_grad, grad_stride, left, d, D, U)
        _, since, until = _place(positions, b, t + U - 1, T, PACKED)
        inside = (since >= U + W - 2) & (t + U <= end)
        if HAS_FINAL:
            inside = inside & (until >= W)
        if inside:
            for j in tl.static_range(U):
                x_t = group[j].to(tl.float32)
                g = grads[j].to(tl.float32)
                if SILU or UNIT:
                    g = _through_activation(g, _convolve(window, x_t, taps, offset, W), SILU, UNIT_P)
                sums = _add_sums(sums, g, window, x_t, W)
                pending, done = _add_pending(pending, g * taps[W - 1], g, since, taps, W, False)
                own_output = _only_if(t + j - (W - 1) >= begin, d, D)
                tl.store(p_out + j * D, done.to(grad_x.dtype.element_ty), mask=own_output)
                window = _push(window, x_t, W)
        else:
            for j in range(U):
                s, since, until = _place(positions, b, t + j, T, PACKED)
                within = _only_if(left > j, d, D)
                x_t = tl.load(p_x + j * stride, mask=within, other=0.0).to(tl.float32)
                g = tl.load(p_grad + j * grad_stride, mask=within, other=0.0).to(tl.float32)
                own = _own(window, initial, s, since, d, D, W, HAS_INITIAL)
                if SILU or UNIT:
                    g = _through_activation(g, _convolve(own, x_t, taps, offset, W), SILU, UNIT_P)
                by_x = g * taps[W - 1]
                if HAS_FINAL:
                    p_final = grad_final + (s.to(tl.int64) * (W - 1) + (W - 1 - until)) * D + d
                    near = _only_if((left > j) & (until < W), d, D)
                    by_x += tl.load(p_final, mask=near, other=0.0).to(tl.float32)
                sums = _add_sums(sums, tl.where(t + j < end, g, 0.0), own, x_t, W)
                pending, done = _add_pending(pending, by_x, g, since, taps, W, True)
                at = t + j - (W - 1)
                own_output = _only_if((at >= begin) & (at < end), d, D)
                tl.store(p_out + j * D, done.to(grad_x.dtype.element_ty), mask=own_output)
                window = _push(window, x_t, W)
        p_x += U * stride
        p_grad += U * grad_stride
        p_out += U * D
        t += U
        left -= U
    p_share = shares + lane.to(tl.int64) * ((W + 1) * D) + d
    for k in tl.static_range(W + 1):
        tl.store(p_share + k * D, sums[k], mask=d < D)


@triton.jit(do_not_specialize=["T"])
def initial_gradient_kernel(
    grad_y,  # as in the backward kernel
    grad_final,
    x,
    weight,
    bias,
    initial,
    cu_seqlens,
    grad_initial,  # (S, W − 1, D)
    T,
    grad_stride,
    stride,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    BD: tl.constexpr,
):
    """The first W − 1 tokens of a sequence again, for the gradient of what stood before them."""
    s, d = _channels(D, BD, UNIT, UNIT_P)
    taps, offset = _taps(weight, bias, d, D, W, HAS_BIAS)
    first, length = _bounds(cu_seqlens, s, T, PACKED)
    state = s.to(tl.int64) * ((W - 1) * D) + d
    window = ()
    sums = ()
    for k in tl.static_range(W - 1):
        window = window + (tl.load(initial + state + k * D, mask=d < D, other=0.0).to(tl.float32),)
        grad = tl.zeros([BD], tl.float32)
        if HAS_FINAL:  # a sequence shorter than the state leaves a part of its initial state in the final one
            p_final = grad_final + state + (k - length) * D
            grad += tl.load(p_final, mask=_only_if(length <= k, d, D), other=0.0).to(tl.float32)
        sums = sums + (grad,)
    for t in tl.static_range(W - 1):
        within = _only_if(length > t, d, D)
        x_t = tl.load(x + (first + t) * stride + d, mask=within, other=0.0).to(tl.float32)
        g = tl.load(grad_y + (first + t) * grad_stride + d, mask=within, other=0.0).to(tl.float32)
        if SILU or UNIT:
            g = _through_activation(g, _convolve(window, x_t, taps, offset, W), SILU, UNIT_P)
        window = _push(window, x_t, W)
        grown = ()
        for k in tl.static_range(W - 1):
            if k >= t:
                grown = grown + (sums[k] + g * taps[k - t],)
            else:
                grown = grown + (sums[k],)
        sums = grown
    for k in tl.static_range(W - 1):
        tl.store(grad_initial + state + k * D, sums[k].to(grad_initial.dtype.element_ty), mask=d < D)
