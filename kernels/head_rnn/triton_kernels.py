"""Dense recurrences within heads, in Triton: one program steps one head of 16 sequences through all of their tokens.

The recurrent weights are loaded once and stay on the chip, as operands of the tensor cores; the states stay in
registers. A step is a chain that cannot be cut: h through shared memory into the products, the products, the
nonlinearities. What it needs from memory is loaded a step ahead.

The backward kernel repeats each step from the stored states, so that it sees the very pre-activations of the forward
kernel and none need be stored. Where the weights and their transposes do not fit on the chip together (128 channels),
the products h W of all steps come from one matrix product beforehand. The gradient of the weights is another,
afterwards.
"""

import triton
import triton.language as tl


@triton.jit
def _load(p, stride, mask, N: tl.constexpr):
    """N tiles, `stride` elements apart, in their own type."""
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.load(p + i * stride, mask=mask, other=0.0),)
    return out


@triton.jit
def _wide(x):
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i].to(tl.float32),)
    return out


@triton.jit
def _recur(h, weights, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """h W of every gate."""
    out = ()
    for i in tl.static_range(len(weights)):
        out = out + (tl.dot(h.to(DOT), weights[i], input_precision=PRECISION),)
    return out


@triton.jit
def _weights(weight, n, H, K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, DOT: tl.constexpr):
    """(KP, KP) of each gate of head n, zero beyond K."""
    k = tl.arange(0, KP)
    place = k[:, None] * K + k[None, :]
    inside = (k < K)[:, None] & (k < K)[None, :]
    out = ()
    for g in tl.static_range(G):
        out = out + (tl.load(weight + (g * H + n) * (K * K) + place, mask=inside, other=0.0).to(DOT),)
    return out


@triton.jit
def forward_kernel(
    gates,  # (N, G, H, K): N tokens of all sequences
    weight,  # (G, H, K, K)
    initial,  # (S, NS, H, K) float32
    bounds,  # (S + 1,) int64: the sequences' tokens
    order,  # (S,) int64: the sequences, longest first
    h,  # (N, H, K)
    states,  # (N, NS − 1, H, K) float32: what the step leaves besides h; only if SAVE
    final,  # (S, NS, H, K) float32
    S,
    H,
    STEP: tl.constexpr,
    G: tl.constexpr,
    NS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,  # K, filled up to what the tensor cores take
    BS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SAVE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, n = tl.program_id(0) // H, tl.program_id(0) % H
    row = tile * BS + tl.arange(0, BS)
    sequence = tl.load(order + row, mask=row < S, other=0)
    begin = tl.load(bounds + sequence)
    length = tl.where(row < S, (tl.load(bounds + sequence + 1) - begin).to(tl.int32), 0)
    steps = tl.max(length)
    k = tl.arange(0, KP)[None, :]
    length = tl.where(k < K, length[:, None], 0)  # (BS, KP)
    stride = H * K

    weights = _weights(weight, n, H, K, KP, G, DOT)
    channel = n * K + k
    p_state = sequence[:, None] * (NS * stride) + channel
    state = ()
    for i in tl.static_range(NS):
        if HAS_INITIAL:
            state = state + (tl.load(initial + p_state + i * stride, mask=length > 0, other=0.0),)
        else:
            state = state + (tl.zeros([BS, KP], tl.float32),)
    p_gates = gates + begin[:, None] * (G * stride) + channel
    p_h = h + begin[:, None] * stride + channel
    p_states = states + begin[:, None] * ((NS - 1) * stride) + channel

    following = _load(p_gates, stride, length > 0, G)
    for t in range(steps):
        u = _wide(following)
        p_gates += G * stride
        following = _load(p_gates, stride, length > t + 1, G)
        rec = _recur(state[NS - 1], weights, DOT, PRECISION)
        within = length > t
        new = STEP(state, u, rec)
        state_t = ()
        for i in tl.static_range(NS):
            state_t = state_t + (tl.where(within, new[i], state[i]),)
        state = state_t
        tl.store(p_h, state[NS - 1].to(h.dtype.element_ty), mask=within)
        p_h += stride
        if SAVE:
            for i in tl.static_range(NS - 1):
                tl.store(p_states + i * stride, state[i], mask=within)
            p_states += (NS - 1) * stride
    for i in tl.static_range(NS):
        tl.store(final + p_state + i * stride, state[i], mask=length > 0)


@triton.jit
def backward_kernel(
    grad_h,  # (N, H, K)
    grad_final,  # (S, NS, H, K) float32
    gates,
    weight,
    initial,
    bounds,
    order,
    h,
    states,
    products,  # (G, H, N, K): h₋ W; only unless RECUR
    grad_gates,  # (N, G, H, K)
    grad_rec,  # (N, H, K): of the last gate's recurrent part, where it is not that of its input
    grad_initial,  # (S, NS, H, K) float32
    N,
    S,
    H,
    BACK: tl.constexpr,
    G: tl.constexpr,
    NS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    LAST_DIFFERS: tl.constexpr,
    RECUR: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, n = tl.program_id(0) // H, tl.program_id(0) % H
    row = tile * BS + tl.arange(0, BS)
    sequence = tl.load(order + row, mask=row < S, other=0)
    begin = tl.load(bounds + sequence)
    length = tl.where(row < S, (tl.load(bounds + sequence + 1) - begin).to(tl.int32), 0)
    steps = tl.max(length)
    k = tl.arange(0, KP)[None, :]
    length = tl.where(k < K, length[:, None], 0)
    stride = H * K

    weights = _weights(weight, n, H, K, KP, G, DOT)
    channel = n * K + k
    p_state = sequence[:, None] * (NS * stride) + channel
    grad = ()
    start = ()
    for i in tl.static_range(NS):
        if HAS_FINAL:
            grad = grad + (tl.load(grad_final + p_state + i * stride, mask=length > 0, other=0.0),)
        else:
            grad = grad + (tl.zeros([BS, KP], tl.float32),)
        if HAS_INITIAL:
            start = start + (tl.load(initial + p_state + i * stride, mask=length > 0, other=0.0),)
        else:
            start = start + (tl.zeros([BS, KP], tl.float32),)

    last = begin[:, None] + steps - 1
    p_gates = gates + last * (G * stride) + channel
    p_out = grad_gates + last * (G * stride) + channel
    p_rec = grad_rec + last * stride + channel
    p_grad = grad_h + last * stride + channel
    p_h = h + (last - 1) * stride + channel  # of the step before
    p_states = states + (last - 1) * ((NS - 1) * stride) + channel
    p_products = products + (n * N + last) * K + k
    of_gate = tl.cast(N, tl.int64) * H * K

    t = steps - 1
    rec_following = ()
    if not RECUR:
        rec_following = _load(p_products, of_gate, length > t, G)
    u_following = _load(p_gates, stride, length > t, G)
    g_following = tl.load(p_grad, mask=length > t, other=0.0)
    earlier = tl.where(t > 0, length - t, 0) > 0
    before_following = _load(p_states, stride, earlier, NS - 1) + (tl.load(p_h, mask=earlier, other=0.0),)
    for i in range(steps):
        t = steps - 1 - i
        within = length > t
        u = _wide(u_following)
        g = g_following.to(tl.float32)
        state = _wide(before_following)
        if HAS_INITIAL:
            begins = t == 0
            state_0 = ()
            for j in tl.static_range(NS):
                state_0 = state_0 + (tl.where(begins, start[j], state[j]),)
            state = state_0
        p_gates -= G * stride
        p_grad -= stride
        p_h -= stride
        p_states -= (NS - 1) * stride
        next_within = tl.where(t > 0, length - t + 1, 0) > 0
        u_following = _load(p_gates, stride, next_within, G)
        g_following = tl.load(p_grad, mask=next_within, other=0.0)
        earlier = tl.where(t > 1, length - t + 1, 0) > 0
        before_following = _load(p_states, stride, earlier, NS - 1) + (tl.load(p_h, mask=earlier, other=0.0),)

        if RECUR:
            rec = _recur(state[NS - 1], weights, DOT, PRECISION)
        else:
            rec = _wide(rec_following)
            p_products -= K
            rec_following = _load(p_products, of_gate, next_within, G)
        total = ()
        for j in tl.static_range(NS - 1):
            total = total + (grad[j],)
        total = total + (grad[NS - 1] + g,)
        by_u, by_rec, old = BACK(state, u, rec, total)
        for j in tl.static_range(G):
            tl.store(p_out + j * stride, by_u[j].to(grad_gates.dtype.element_ty), mask=within)
        if LAST_DIFFERS:
            tl.store(p_rec, by_rec[G - 1].to(grad_rec.dtype.element_ty), mask=within)
        p_out -= G * stride
        p_rec -= stride
        through = old[NS - 1]
        for j in tl.static_range(G):
            through = tl.dot(by_rec[j].to(DOT), tl.trans(weights[j]), through, input_precision=PRECISION)
        grad_t = ()
        for j in tl.static_range(NS - 1):
            grad_t = grad_t + (tl.where(within, old[j], grad[j]),)
        grad = grad_t + (tl.where(within, through, grad[NS - 1]),)
    if HAS_INITIAL:
        for i in tl.static_range(NS):
            tl.store(grad_initial + p_state + i * stride, grad[i], mask=length > 0)
