"""What the two-layer memory's kernels are made of: tiles of its state, its activation, its norm and its error.

The state of one sequence and head is P blocks of F (K + V) numbers: W₁ᵀ (F, K) and W₂ (F, V), and with momentum
(P = 2) S₁ᵀ and S₂ after them. A program holds BF of the F hidden channels, always as rows, whatever else the columns
are: those of W₁ᵀ, of W₂, or C tokens. Then the left operands of products have many rows however few tokens a chunk
has, and what one product gives is the next one's left operand where it is.

What is summed over hidden channels each tile writes for itself, (S, H, F / BF, C, ·) float32, and programs of `TOKENS`
tokens add up: nothing depends on which program comes first.
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
def slot_of(program, place, number, keep, ALL: tl.constexpr):
    """Where what a backward pass goes by lies of a chunk: among those of ALL chunks (M, H, …), or of its group's
    (S, H, keep, …)."""
    if ALL:
        return place
    else:
        return program * keep + number % keep


@triton.jit
def multiply(a, b, dtype: tl.constexpr, acc=None):
    """a b (+ acc) of operands that are rounded to `dtype`."""
    return dot(a.to(dtype), b.to(dtype), acc)


@triton.jit
def settle(x, dtype: tl.constexpr):
    """x in `dtype`, here and now. Compilers put off what is used late, and hold all that it is made of till then."""
    x = x.to(dtype)
    if INTERPRETED:
        return x
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=PACK)


@triton.jit
def load_tile(p, i, at, WIDTH: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr):
    """Rows `i` … of a matrix with rows of WIDTH numbers, and columns `at` … of them, as (BF, BW)."""
    row, column = tl.arange(0, BF), at + tl.arange(0, BW)
    place = row[:, None] * WIDTH + column[None, :]  # of 32 bits: addresses cost registers
    return tl.load(p + i * WIDTH + place, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(p, tile, i, at, WIDTH: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr):
    row, column = tl.arange(0, BF), at + tl.arange(0, BW)
    place = row[:, None] * WIDTH + column[None, :]
    tl.store(p + i * WIDTH + place, tile.to(p.dtype.element_ty), mask=(column < WIDTH)[None, :])


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
def load_row(p, C: tl.constexpr):
    """(1, C)."""
    return tl.load(p + tl.arange(0, C))[None, :]


@triton.jit
def weigh(d, rows, sign, P: tl.constexpr, C: tl.constexpr):
    """± d (BF, C) with the tokens' weights for W, and with those for S if P is 2, in the type of d."""
    x = d.to(tl.float32) * sign
    return settle(x * load_row(rows, C), d.dtype), settle(x * load_row(rows + (P - 1) * C, C), d.dtype)


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
    token, channel = tl.arange(0, C), tl.arange(0, BW)
    mask = (channel < WIDTH)[:, None] & (token < left)[None, :]
    return tl.load(p + (token[None, :] * STRIDE + channel[:, None]), mask=mask, other=0.0)


@triton.jit
def store_tokens(p, x, left, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr):
    token, channel = tl.arange(0, C), tl.arange(0, BW)
    mask = (channel < WIDTH)[:, None] & (token < left)[None, :]
    tl.store(p + (token[None, :] * STRIDE + channel[:, None]), x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def apply(
    p, i, x, left, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Rows `i` … of a matrix with rows of WIDTH numbers, times C tokens: (BF, C)."""
    y = tl.zeros([BF, C], tl.float32)
    for at in tl.range(0, WIDTH, BW, disable_licm=True):
        tokens = load_tokens(x + at, left, STRIDE, WIDTH - at, BW, C)
        y = multiply(load_tile(p, i, at, WIDTH, BW, BF), tokens, dtype, y)
    return y


@triton.jit
def scores(
    x, y, left, OF_X: tl.constexpr, OF_Y: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Xᵀ Y (C, C) of tokens that lie OF_X and OF_Y apart."""
    total = tl.zeros([C, C], tl.float32)
    for at in tl.range(0, WIDTH, BW, disable_licm=True):
        of_x = load_tokens(x + at, left, OF_X, WIDTH - at, BW, C)
        of_y = load_tokens(y + at, left, OF_Y, WIDTH - at, BW, C)
        total = multiply(tl.trans(of_x), of_y, of_x.dtype, total)
    return total


@triton.jit
def load_sum(p, SIZE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, TILES: tl.constexpr):
    """(BW, TOKENS): the sum of what TILES tiles, SIZE numbers apart, have written."""
    x = load_tokens(p, TOKENS, WIDTH, WIDTH, BW, TOKENS)
    for tile in tl.static_range(1, TILES):
        x += load_tokens(p + tile * SIZE, TOKENS, WIDTH, WIDTH, BW, TOKENS)
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
