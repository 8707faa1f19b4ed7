"""The outputs of the state space dual recurrence: a walk along the chunks of a sequence, with the state in registers. A
program owns one sequence, one head and BP of its channels.

With the names of `chunked.py`, for a chunk of Q tokens that starts in state H:

    Y  = diag(eᵃ) C Hᵀ + (L ⊙ C Bᵀ ⊙ dt_j) X + D X
    Hᵀ = e^{a_Q} Hᵀ + Bᵀ diag(e^{a_Q − a_j} dt_j) X

States are held transposed, (N, BP): both products that end in it or begin with it then have the N, or the Q tokens, as
their long side, however few channels a program has. Operands are in the type of the inputs, sums in float32.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import sequence
from riverrun.kernels.common.triton_math import dot, exp


@triton.jit
def load_rows(p, row, here, STRIDE: tl.constexpr, column, WIDTH: tl.constexpr):
    """The columns `column` of rows `row`, which lie STRIDE apart; zero where not `here`, and beyond WIDTH columns."""
    mask = here[:, None] & (column < WIDTH)[None, :]
    return tl.load(p + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(p, tile, row, here, STRIDE: tl.constexpr, column, WIDTH: tl.constexpr):
    mask = here[:, None] & (column < WIDTH)[None, :]
    tl.store(p + row[:, None] * STRIDE + column[None, :], tile.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_state(p, row, column, N: tl.constexpr, P: tl.constexpr):
    """Of a state (P, N) the tile (row, column) of its transpose."""
    mask = (row < N)[:, None] & (column < P)[None, :]
    return tl.load(p + column[None, :] * N + row[:, None], mask=mask, other=0.0)


@triton.jit
def store_state(p, tile, row, column, N: tl.constexpr, P: tl.constexpr):
    mask = (row < N)[:, None] & (column < P)[None, :]
    tl.store(p + column[None, :] * N + row[:, None], tile, mask=mask)


@triton.jit
def load_steps(steps, decays, place, step, Q: tl.constexpr):
    """Δ, a and a_Q of a chunk of a head."""
    return tl.load(steps + place + step), tl.load(decays + place + step), tl.load(decays + place + Q - 1)


@triton.jit
def forward_kernel(
    x,  # (B, T, H, P)
    steps,  # (M, H, Q) float32: Δ
    decays,  # (M, H, Q) float32: a
    B,  # (B, T, G, N)
    C,  # (B, T, G, N)
    D,  # (H,) or (H, P) float32
    initial,  # (S, H, P, N) float32
    y,  # (B, T, H, P)
    final,  # (S, H, P, N) float32
    cu_seqlens,
    first,
    T,
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
    HAS_D: tl.constexpr,
    BY_CHANNEL: tl.constexpr,  # D is (H, P)
    HAS_INITIAL: tl.constexpr,
    KEEP_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    walk, block = tl.program_id(0) // tl.cdiv(P, BP), tl.program_id(0) % tl.cdiv(P, BP)
    s, h = (walk // H).to(tl.int64), walk % H
    g = h // (H // G)
    channel, row, step = block * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    begin, tokens, c = sequence(cu_seqlens, first, s, T, Q, PACKED)
    if HAS_D:
        if BY_CHANNEL:
            skip = tl.load(D + h * P + channel, mask=channel < P, other=0.0)
        else:
            skip = tl.load(D + h)
    if HAS_INITIAL:
        state = load_state(initial + (s * H + h) * P * N, row, channel, N, P)
    else:
        state = tl.zeros([BN, BP], tl.float32)

    for at in tl.range(0, tokens, Q, num_stages=STAGES):
        token = begin + at
        here = step < tokens - at
        x_tile = load_rows(x + token * X_STRIDE + h * P, step, here, X_STRIDE, channel, P)
        B_tile = load_rows(B + token * B_STRIDE + g * N, step, here, B_STRIDE, row, N)
        C_tile = load_rows(C + token * C_STRIDE + g * N, step, here, C_STRIDE, row, N)
        d, a, end = load_steps(steps, decays, ((c + at // Q) * H + h) * Q, step, Q)

        kept = (x_tile.to(tl.float32) * (d * exp(end - a))[:, None]).to(dtype)
        scores = dot(C_tile, tl.trans(B_tile))
        scores *= exp(tl.where(step[:, None] >= step[None, :], a[:, None] - a[None, :], float("-inf")))
        scores *= d[None, :]
        if HAS_D and not BY_CHANNEL:
            scores += tl.where(step[:, None] == step[None, :], skip, 0.0)
        out = dot(C_tile, state.to(dtype)) * exp(a)[:, None]
        out = dot(scores.to(dtype), x_tile, out)
        if HAS_D and BY_CHANNEL:
            out += x_tile.to(tl.float32) * skip[None, :]
        store_rows(y + (token * H + h) * P, out, step, here, H * P, channel, P)
        state = dot(tl.trans(B_tile), kept, state * exp(end))
    if KEEP_FINAL:
        store_state(final + (s * H + h) * P * N, state, row, channel, N, P)
