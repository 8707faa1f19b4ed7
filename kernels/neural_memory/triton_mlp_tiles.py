"""What the two-layer memory's kernels are made of: tiles of its state, its activation, its norm and its error.

The state of one sequence and head is P blocks of F (K + V) numbers: W₁ᵀ (F, K) and W₂ (F, V), and with momentum
(P = 2) S₁ᵀ and S₂ after them. A program holds BF of the F hidden channels: W₁ as (K, BF), W₂ as (BF, V), and tokens are
rows. So the state is the right operand of most products, which Hopper reads from shared memory whatever it does with
the left, and what they give has a few rows of tokens.

What is summed over hidden channels each tile writes for itself, (F / BF, C, ·) float32, and others add up: nothing
depends on which program comes first.

Half of the registers are the state's, for as long as a sequence is. So this is written against what compilers do to
save instructions: `afresh`, `settle` and `widen` keep them from holding addresses, factors and wider copies of numbers
till they are used again, as `disable_licm` does in loops. Without, the walk took half as long again.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.memory_rule import NORM_EPS
from riverrun.kernels.common.triton_chunks import sequence
from riverrun.kernels.common.triton_math import INTERPRETED, dot, exp, reciprocal, sigmoid

TOKENS = tl.constexpr(16)
EPS = tl.constexpr(NORM_EPS)


@triton.jit
def locate(program, number, cu_seqlens, first, T, H: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr):
    """Of chunk `number` of a sequence and head s · H + h: its first token; how many tokens there are from there to the
    sequence's end, none or fewer if there is no such chunk; and its place among all chunks and heads, m · H + h."""
    s, h = program // H, program % H
    begin, tokens, c = sequence(cu_seqlens, first, s, T, C, PACKED)
    return begin + number * C, tokens - number * C, (c + number) * H + h


@triton.jit
def multiply(a, b, dtype: tl.constexpr, acc=None):
    """a b (+ acc) of operands that are rounded to `dtype`."""
    return dot(a.to(dtype), b.to(dtype), acc)


@triton.jit
def apart(a, b, dtype: tl.constexpr, once, acc=None):
    """a b (+ acc), in a loop of one turn. Triton gives all warps the rows of a product that another is made of, and
    what is left over the same rows again; a loop hides that it is."""
    y = tl.zeros([a.shape[0], b.shape[1]], tl.float32) if acc is None else acc
    for _ in tl.range(0, once, disable_licm=True):
        y = multiply(a, b, dtype, y)
    return y


@triton.jit
def settle(x, dtype: tl.constexpr):
    """x in `dtype`, here and now: not put off till it is used, with all that it is made of held till then."""
    x = x.to(dtype)
    if INTERPRETED:
        return x
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=PACK)


@triton.jit
def afresh(i):
    """i, of 32 bits; what depends on it is computed from here on."""
    if INTERPRETED:
        return i
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i], tl.int32, is_pure=False, pack=1)


@triton.jit
def _count(N: tl.constexpr):
    """0 … N − 1, of which addresses are made."""
    return tl.arange(0, N) + afresh(tl.full((), 0, tl.int32))


@triton.jit
def widen(x):
    """x in float32, for once."""
    return settle(x, x.dtype).to(tl.float32)


@triton.jit
def load_tile(p, i, WIDTH: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr):
    """Rows `i` … of a matrix with rows of WIDTH numbers, as (BF, BW)."""
    row, column = _count(BF), tl.arange(0, BW)
    place = row[:, None] * WIDTH + column[None, :]  # of 32 bits: addresses cost registers
    return tl.load(p + i * WIDTH + place, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(p, tile, i, WIDTH: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr):
    row, column = _count(BF), tl.arange(0, BW)
    place = row[:, None] * WIDTH + column[None, :]
    tl.store(p + i * WIDTH + place, tile.to(p.dtype.element_ty), mask=(column < WIDTH)[None, :])


@triton.jit
def load_state(
    p, i, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, P: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    """Hidden channels `i` … of W₁, S₁ (WK, BF), W₂ and S₂ (BF, WV) of the state at p; S₁ and S₂ are zeros if P is 1."""
    W1, W2 = tl.trans(load_tile(p, i, K, WK, BF)), load_tile(p + F * K, i, V, WV, BF)
    if P == 2:
        p += F * (K + V)
        return W1, tl.trans(load_tile(p, i, K, WK, BF)), W2, load_tile(p + F * K, i, V, WV, BF)
    else:
        return W1, tl.zeros_like(W1), W2, tl.zeros_like(W2)


@triton.jit
def store_state(
    p, W1, S1, W2, S2, i, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, P: tl.constexpr, WK: tl.constexpr,
    WV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    store_tile(p, tl.trans(W1), i, K, WK, BF)
    store_tile(p + F * K, W2, i, V, WV, BF)
    if P == 2:
        p += F * (K + V)
        store_tile(p, tl.trans(S1), i, K, WK, BF)
        store_tile(p + F * K, S2, i, V, WV, BF)


@triton.jit
def activation(z, SILU: tl.constexpr):
    """φ(z), φ'(z), φ''(z): of what is not used nothing is computed."""
    if SILU:
        s = sigmoid(z)
        slope = s * (1.0 - s)
        return z * s, s + z * slope, slope * (2.0 + z * (1.0 - 2.0 * s))
    else:
        # the tail of the normal distribution after Abramowitz and Stegun, 7.1.26, to 1e-7
        bell = exp(-0.5 * z * z)
        t = reciprocal(1.0 + 0.23164189 * tl.abs(z))
        tail = 0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)
        tail = bell * t * (0.127414796 + t * (-0.142248368 + t * tail))
        below = tl.where(z < 0.0, tail, 1.0 - tail)
        density = bell * 0.3989422804014327
        return z * below, below + z * density, density * (2.0 - z * z)


@triton.jit
def load_column(p, C: tl.constexpr):
    """(C, 1)."""
    return tl.load(p + tl.arange(0, C))[:, None]


@triton.jit
def load_rows(p, left, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr):
    """(C, BW): up to C tokens, of which `left` are there, that lie STRIDE apart; zeros beyond, and from WIDTH on."""
    token, channel = _count(C), tl.arange(0, BW)
    mask = (channel < WIDTH)[None, :] & (token < left)[:, None]
    return tl.load(p + (token[:, None] * STRIDE + channel[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(p, x, left, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr):
    token, channel = _count(C), tl.arange(0, BW)
    mask = (channel < WIDTH)[None, :] & (token < left)[:, None]
    tl.store(p + (token[:, None] * STRIDE + channel[None, :]), x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def weigh(x, rows, sign, C: tl.constexpr):
    """± x with the tokens' weights, in the type of x."""
    return settle(widen(x) * (sign * load_column(rows, C)), x.dtype)


@triton.jit
def store_sum(p, x, axis: tl.constexpr, SIZE: tl.constexpr):
    """The sums of x over an axis, of which SIZE are there."""
    at = tl.arange(0, x.shape[1 - axis])
    tl.store(p + at, tl.sum(x, axis), mask=at < SIZE)


@triton.jit
def load_gain(norm_weight, h, V: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr):
    """γ of head h (BV, 1)."""
    value = tl.arange(0, BV)
    if NORM:
        return tl.load(norm_weight + h * V + value, mask=value < V, other=0.0).to(tl.float32)[:, None]
    else:
        return tl.zeros([BV, 1], tl.float32)


@triton.jit
def load_tokens(p, left, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr):
    """(BW, C): up to C tokens, of which `left` are there, that lie STRIDE apart; zeros beyond, and below WIDTH."""
    token, channel = _count(C), tl.arange(0, BW)
    mask = (channel < WIDTH)[:, None] & (token < left)[None, :]
    return tl.load(p + (token[None, :] * STRIDE + channel[:, None]), mask=mask, other=0.0)


@triton.jit
def store_tokens(p, x, left, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr):
    token, channel = _count(C), tl.arange(0, BW)
    mask = (channel < WIDTH)[:, None] & (token < left)[None, :]
    tl.store(p + (token[None, :] * STRIDE + channel[:, None]), x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_sum(p, SIZE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, TILES: tl.constexpr, N: tl.constexpr):
    """(BW, N): the sum of what TILES tiles, SIZE numbers apart, have written of N tokens."""
    token, channel = _count(N), tl.arange(0, BW)
    p, mask = p + (token[None, :] * WIDTH + channel[:, None]), (channel < WIDTH)[:, None]
    x = tl.load(p, mask=mask, other=0.0)
    for tile in tl.static_range(1, TILES):
        x += tl.load(p + tile * SIZE, mask=mask, other=0.0)
    return x


@triton.jit
def mean(x, V: tl.constexpr):
    """(1, C) of V channels; those beyond are zero."""
    return (tl.sum(x, 0) * (1.0 / V))[None, :]


@triton.jit
def unit(u, V: tl.constexpr, BV: tl.constexpr):
    """The normalised tokens (BV, C), and the factor (1, C) that made them of centred ones."""
    within = (tl.arange(0, BV) < V)[:, None]
    centred = tl.where(within, u - mean(u, V), 0.0)
    factor = tl.rsqrt(mean(centred * centred, V) + EPS)
    return centred * factor, factor


@triton.jit
def through_norm(x, n, factor, V: tl.constexpr, BV: tl.constexpr):
    """From the gradient of the normalised tokens n that of what they were made of. The operator is symmetric."""
    within = (tl.arange(0, BV) < V)[:, None]
    return tl.where(within, factor * (x - mean(x, V) - n * mean(x * n, V)), 0.0)


@triton.jit
def _missed(f, k, v, RESIDUAL: tl.constexpr):
    return f + k.to(tl.float32) - v.to(tl.float32) if RESIDUAL else f - v.to(tl.float32)


@triton.jit
def error(u, k, v, gain, V: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr):
    """δ₂, the inner loss's gradient of u = W₂ᵀ H (BV, C)."""
    if NORM:
        n, factor = unit(u, V, BV)
        return through_norm(gain * _missed(n * gain, k, v, RESIDUAL), n, factor, V, BV)
    else:
        return _missed(u, k, v, RESIDUAL)


@triton.jit
def error_gradients(
    x, u, k, v, gain, V: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """From the gradient x of δ₂ those of e = [k +] f − v and of u, and of the gain, to be summed over tokens.

    With g = γ e and J = r (1 − mean − n mean n·), δ₂ = J g; J depends on u through n and r too.
    """
    if NORM:
        n, factor = unit(u, V, BV)
        e = _missed(n * gain, k, v, RESIDUAL)
        g = gain * e
        by_g = through_norm(x, n, factor, V, BV)
        by_e = gain * by_g
        by_n = gain * by_e - factor * (x * mean(g * n, V) + g * mean(x * n, V))
        by_factor = mean(x * through_norm(g, n, factor, V, BV), V) * factor
        by_u = through_norm(by_n, n, factor, V, BV) - by_factor * n
        return by_e, by_u, e * by_g + n * by_e
    else:
        return x, x, x
