"""The two walks of a linear memory over a sequence's chunks: its weights W and momentum S forwards, their adjoints
backwards. A program owns one sequence, one head and BV channels of the values.

With G, β, f, m, N of `gates.py`, g = G_b, n = N_b their last rows, and P, T of `triton_linear_prepare.py`:

    E = K W − V;  online  E = T (β⁻ K W + f⁻ K S − V)        O = β Q W + f Q S − P E
    W' = β_b W + f_b S − (g K)ᵀ E                             S' = m_b S − (n K)ᵀ E

and backwards, from dO and the adjoints dW', dS' at the chunk's end,

    dE = −Pᵀ dO − g K dW' − n K dS'         Y = dE;  online  Y = Tᵀ dE         dV = −Y
    dW = β_b dW' + (β Q)ᵀ dO + Kᵀ Y         dS = f_b dW' + m_b dS' + (f Q)ᵀ dO;  online  + β⁻, f⁻ before K

Two states and what is made of them are more than registers hold easily, and two programs have to share a multiprocessor
to compute while the other waits. So tiles are narrow, rows are tokens or keys' channels (a token's gates are then two
numbers a thread), and whatever reads W comes before what reads S: their copies in the inputs' type, from which shared
memory feeds the products, take turns.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import sequence
from riverrun.kernels.common.triton_math import dot
from riverrun.kernels.gated_delta.triton_products import load_rows, load_tiles, store_rows
from riverrun.kernels.neural_memory.triton_linear_prepare import late


@triton.jit
def _load_state(p, column, V: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr):
    """A state (K, V) as tiles (BK, BV) in float32."""
    out = ()
    for i in tl.static_range(NK):
        row = i * BK + tl.arange(0, BK)
        out = out + (load_rows(p, row, row < K, V, column, V).to(tl.float32),)
    return out


@triton.jit
def _store_state(p, tiles, column, V: tl.constexpr, rows, BK: tl.constexpr, NK: tl.constexpr):
    """As many of its rows; 0: nothing."""
    for i in tl.static_range(NK):
        row = i * BK + tl.arange(0, BK)
        store_rows(p, tiles[i], row, row < rows, V, column, V)


@triton.jit
def _zeros(BK: tl.constexpr, BV: tl.constexpr, NK: tl.constexpr):
    out = ()
    for _ in tl.static_range(NK):
        out = out + (tl.zeros([BK, BV], tl.float32),)
    return out


@triton.jit
def _read(x, state, NK: tl.constexpr):
    """What rows x (C, BK) read from a state of tiles (BK, BV) → (C, BV)."""
    out = dot(x[0], state[0].to(x[0].dtype))
    for i in tl.static_range(1, NK):
        out = dot(x[i], state[i].to(x[i].dtype), out)
    return out


@triton.jit
def _written(rows, weight, x, state):
    """state + Σ_t rows_t weight_t x_tᵀ, of rows (C, BK), x (C, BV)."""
    return dot(tl.trans(rows), (x.to(tl.float32) * weight[:, None]).to(rows.dtype), state)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q,  # (B, T, H, K)
    k,  # (B, T, H, K)
    v,  # (B, T, H, V)
    decay,  # (M, H, C) float32: β
    weight,  # (M, H, C, C) float32: G
    carry,  # (M, H, C) float32: f
    momentum_decay,  # (M, H) float32: m_b
    momentum_weight,  # (M, H, C) float32: N_b
    scores,  # (M, H, C, C): −P
    inverse,  # (M, H, C, C): T
    initial,  # (S, H, K, V) float32
    initial_momentum,  # (S, H, K, V) float32
    o,  # (B, T, H, V)
    final,  # (S, H, K, V) float32
    final_momentum,  # (S, H, K, V) float32
    states,  # (M, H, K, V): W at the chunks' starts
    momenta,  # (M, H, K, V): S
    errors,  # (B, T, H, V): E
    cu_seqlens,
    first,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    LATE: tl.constexpr,
    ONLINE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,  # an initial one
    PACKED: tl.constexpr,
    READ: tl.constexpr,  # o and the final states
    SAVE: tl.constexpr,  # states, momenta and errors
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    s, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    begin, tokens, c = sequence(cu_seqlens, first, s, T, C, PACKED)
    t = tl.arange(0, C)

    W = _load_state(initial + (s * H + h) * K * V, column, V, K, BK, NK)
    if HAS_MOMENTUM:
        S = _load_state(initial_momentum + (s * H + h) * K * V, column, V, K, BK, NK)
    elif MOMENTUM:
        S = _zeros(BK, BV, NK)
    if SAVE:
        rows = tl.where(tokens > 0, K, 0)
        _store_state(states + (c * H + h) * K * V, W, column, V, rows, BK, NK)
        if MOMENTUM:
            _store_state(momenta + (c * H + h) * K * V, S, column, V, rows, BK, NK)
    for at in tl.range(0, tokens, C, num_stages=STAGES):
        token = begin + at
        index = (c + at // C) * H + h
        place, square = index * C, t[:, None] * C + t[None, :]
        here = t < tokens - at
        k_tiles = load_tiles(k + (token * H + h) * K, t, here, H * K, K, BK, NK)
        place_v = (token * H + h) * V
        E = _read(k_tiles, W, NK)
        if ONLINE:
            E *= late(decay + place, t, 1, 1.0)[:, None]
        if READ:
            q_tiles = load_tiles(q + (token * H + h) * K, t, here, H * K, K, BK, NK)
            out = _read(q_tiles, W, NK) * late(decay + place, t, LATE, 1.0)[:, None]
        if MOMENTUM:
            if ONLINE:
                E += _read(k_tiles, S, NK) * late(carry + place, t, 1, 0.0)[:, None]
            if READ:
                out += _read(q_tiles, S, NK) * late(carry + place, t, LATE, 0.0)[:, None]
        E = (E - load_rows(v + place_v, t, here, H * V, column, V).to(tl.float32)).to(dtype)
        if ONLINE:
            E = dot(tl.load(inverse + place * C + square), E).to(dtype)
        if READ:
            out = dot(tl.load(scores + place * C + square), E, out)
            store_rows(o + place_v, out, t, here, H * V, column, V)
        if SAVE:
            store_rows(errors + place_v, E, t, here, H * V, column, V)

        kept = tl.load(decay + place + C - 1)
        last = -tl.load(weight + (place + C - 1) * C + t)
        new_W = ()
        for i in tl.static_range(NK):
            tile = W[i] * kept
            if MOMENTUM:
                tile += S[i] * tl.load(carry + place + C - 1)
            new_W = new_W + (_written(k_tiles[i], last, E, tile),)
        W = new_W
        if MOMENTUM:
            kept, last = tl.load(momentum_decay + index), -tl.load(momentum_weight + place + t)
            new_S = ()
            for i in tl.static_range(NK):
                new_S = new_S + (_written(k_tiles[i], last, E, S[i] * kept),)
            S = new_S
        if SAVE:  # what the next chunk starts from, here: shared memory has no room for it beside the operands above
            next_place, rows = (index + H) * K * V, tl.where(at + C < tokens, K, 0)
            _store_state(states + next_place, W, column, V, rows, BK, NK)
            if MOMENTUM:
                _store_state(momenta + next_place, S, column, V, rows, BK, NK)
    if READ:
        _store_state(final + (s * H + h) * K * V, W, column, V, K, BK, NK)
        if MOMENTUM:
            _store_state(final_momentum + (s * H + h) * K * V, S, column, V, K, BK, NK)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    grad_o,  # (B, T, H, V)
    grad_final,  # (S, H, K, V) float32
    grad_final_momentum,  # (S, H, K, V) float32
    q,
    k,
    decay,
    weight,
    carry,
    momentum_decay,
    momentum_weight,
    scores,
    inverse,
    grad_v,  # (B, T, H, V): −Y
    grad_states,  # (M, H, K, V): the adjoints of W at the chunks' ends
    grad_momenta,  # (M, H, K, V): those of S
    grad_initial,  # (S, H, K, V) float32
    grad_initial_momentum,  # (S, H, K, V) float32
    cu_seqlens,
    first,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    LATE: tl.constexpr,
    ONLINE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,  # an adjoint of the final one
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = k.dtype.element_ty
    s, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    begin, tokens, c = sequence(cu_seqlens, first, s, T, C, PACKED)
    t = tl.arange(0, C)
    last = (tl.cdiv(tokens, C) - 1) * C

    if HAS_FINAL:
        W = _load_state(grad_final + (s * H + h) * K * V, column, V, K, BK, NK)
    else:
        W = _zeros(BK, BV, NK)
    if HAS_MOMENTUM:
        S = _load_state(grad_final_momentum + (s * H + h) * K * V, column, V, K, BK, NK)
    elif MOMENTUM:
        S = _zeros(BK, BV, NK)
    for back in tl.range(0, tokens, C, num_stages=STAGES):
        at = last - back
        token = begin + at
        index = (c + at // C) * H + h
        place, square = index * C, t[:, None] * C + t[None, :]
        here = t < tokens - at
        k_tiles = load_tiles(k + (token * H + h) * K, t, here, H * K, K, BK, NK)
        q_tiles = load_tiles(q + (token * H + h) * K, t, here, H * K, K, BK, NK)
        place_v = (token * H + h) * V
        g_o = load_rows(grad_o + place_v, t, here, H * V, column, V)

        Y = _read(k_tiles, W, NK) * -tl.load(weight + (place + C - 1) * C + t)[:, None]
        _store_state(grad_states + index * K * V, W, column, V, K, BK, NK)
        if MOMENTUM:
            Y -= _read(k_tiles, S, NK) * tl.load(momentum_weight + place + t)[:, None]
            _store_state(grad_momenta + index * K * V, S, column, V, K, BK, NK)
        Y = dot(tl.trans(tl.load(scores + place * C + square)), g_o, Y)
        if ONLINE:
            Y = dot(tl.trans(tl.load(inverse + place * C + square)), Y.to(dtype))
        Y = Y.to(dtype)
        store_rows(grad_v + place_v, -Y.to(tl.float32), t, here, H * V, column, V)

        if MOMENTUM:
            carried, kept = tl.load(carry + place + C - 1), tl.load(momentum_decay + index)
            of_query = late(carry + place, t, LATE, 0.0)
            new_S = ()
            for i in tl.static_range(NK):
                adjoint = _written(q_tiles[i], of_query, g_o, W[i] * carried + S[i] * kept)
                if ONLINE:
                    adjoint = _written(k_tiles[i], late(carry + place, t, 1, 0.0), Y, adjoint)
                new_S = new_S + (adjoint,)
            S = new_S
        kept, of_query = tl.load(decay + place + C - 1), late(decay + place, t, LATE, 1.0)
        new_W = ()
        for i in tl.static_range(NK):
            adjoint = _written(q_tiles[i], of_query, g_o, W[i] * kept)
            if ONLINE:
                adjoint = _written(k_tiles[i], late(decay + place, t, 1, 1.0), Y, adjoint)
            else:
                adjoint = dot(tl.trans(k_tiles[i]), Y, adjoint)
            new_W = new_W + (adjoint,)
        W = new_W
    _store_state(grad_initial + (s * H + h) * K * V, W, column, V, K, BK, NK)
    if MOMENTUM:
        _store_state(grad_initial_momentum + (s * H + h) * K * V, S, column, V, K, BK, NK)
