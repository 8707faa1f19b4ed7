"""What the two-layer memory's kernels are made of: tiles of its state, its activation, its norm and its error.

The state of one sequence and head is P blocks of F (K + V) float32: W₁ᵀ (F, K) and W₂ (F, V), and with momentum
(P = 2) S₁ᵀ and S₂ after them. Kernels hold BF of the F hidden channels at a time, always as rows, whatever else the
columns are: those of W₁ᵀ, of W₂, or C tokens. Then the left operands of products have many rows however few tokens a
chunk has, and what one product gives is the next one's left operand where it is.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_math import dot, exp, sigmoid


@triton.jit
def multiply(a, b, dtype: tl.constexpr, acc=None):
    """a b (+ acc) of operands that are rounded to `dtype`."""
    return dot(a.to(dtype), b.to(dtype), acc)


@triton.jit
def load_tile(p, at, WIDTH: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr):
    """Rows `at` … at + BF of a matrix with rows of WIDTH numbers, as (BF, BW)."""
    row, column = tl.arange(0, BF), tl.arange(0, BW)
    return tl.load(p + at * WIDTH + row[:, None] * WIDTH + column[None, :], mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(p, tile, at, WIDTH: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr):
    row, column = tl.arange(0, BF), tl.arange(0, BW)
    tl.store(p + at * WIDTH + row[:, None] * WIDTH + column[None, :], tile, mask=(column < WIDTH)[None, :])


@triton.jit
def activation(z, SILU: tl.constexpr):
    """φ(z), φ'(z), φ''(z): of what is not used nothing is computed."""
    if SILU:
        s = sigmoid(z)
        slope = s * (1.0 - s)
        return z * s, s + z * slope, slope * (2.0 + z * (1.0 - 2.0 * s))
    else:
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        density = exp(-0.5 * z * z) * 0.3989422804014327
        return z * below, below + z * density, density * (2.0 - z * z)


@triton.jit
def load_row(p, C: tl.constexpr):
    """(1, C)."""
    return tl.load(p + tl.arange(0, C))[None, :]


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
    return tl.load(p + token[None, :] * STRIDE + channel[:, None], mask=mask, other=0.0)


@triton.jit
def store_tokens(p, x, left, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr):
    token, channel = tl.arange(0, C), tl.arange(0, BW)
    mask = (channel < WIDTH)[:, None] & (token < left)[None, :]
    tl.store(p + token[None, :] * STRIDE + channel[:, None], x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def mean(x, V: tl.constexpr):
    """(1, C) of V channels; those beyond are zero."""
    return (tl.sum(x, 0) * (1.0 / V))[None, :]


@triton.jit
def unit(u, V: tl.constexpr, BV: tl.constexpr):
    """The normalised tokens (BV, C), and the factor (1, C) that made them of centred ones."""
    within = (tl.arange(0, BV) < V)[:, None]
    centred = tl.where(within, u - mean(u, V), 0.0)
    factor = tl.rsqrt(mean(centred * centred, V) + 1e-6)
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
