"""Tiles of keys, and matrix products of them, in one of two precisions.

A head's K channels are NK tiles of BK, so that sizes that are not a power of two cost no padding. Keys and queries stay
as they came, in 16 bits; the factors that normalise them, gates and β are float32 and go to the other operand or to the
result, for a rounded unit key would no longer give a reflection.

With β ≤ 1 errors fade, and float32 operands may be rounded to 16 bits. With β up to 2 a step may be a reflection, which
keeps errors for ever: there (EXACT) they are the sum of three 16-bit numbers, and a product is three or six.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_math import dot


@triton.jit
def _parts(x, dtype: tl.constexpr):
    """x as a sum of numbers of type `dtype`: three of them hold the 24 bits of float32."""
    if x.dtype == dtype:
        return (x,)
    else:
        high = x.to(dtype)
        rest = x - high.to(tl.float32)
        middle = rest.to(dtype)
        return high, middle, (rest - middle.to(tl.float32)).to(dtype)


@triton.jit
def product(a, b, dtype: tl.constexpr, EXACT: tl.constexpr):
    """a b, of which either may be float32 where `dtype` is narrower."""
    if EXACT:
        a_parts, b_parts = _parts(a, dtype), _parts(b, dtype)
        out = dot(a_parts[0], b_parts[0])
        for i in tl.static_range(len(a_parts)):
            for j in tl.static_range(len(b_parts)):
                if i + j > 0 and i + j < 3:  # beyond lie products of 2⁻²⁴ and less
                    out = dot(a_parts[i], b_parts[j], out)
        return out
    else:
        return dot(a.to(dtype), b.to(dtype))


@triton.jit
def load_tiles(p, row, mask, stride, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr):
    """Rows `row` (R,), which lie `stride` apart, as NK tiles (R, BK); zero where not `mask`."""
    out = ()
    for i in tl.static_range(NK):
        column = i * BK + tl.arange(0, BK)
        tile = tl.load(
            p + row[:, None] * stride + column[None, :], mask=mask[:, None] & (column < K)[None, :], other=0.0
        )
        out = out + (tile,)
    return out


@triton.jit
def store_tiles(p, tiles, row, mask, stride, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr):
    """The inverse of `load_tiles`."""
    for i in tl.static_range(NK):
        column = i * BK + tl.arange(0, BK)
        tl.store(
            p + row[:, None] * stride + column[None, :],
            tiles[i].to(p.dtype.element_ty),
            mask=mask[:, None] & (column < K)[None, :],
        )


@triton.jit
def unit(tiles, NORMALISE: tl.constexpr, NK: tl.constexpr):
    """The factors (R,) that bring the rows to unit length, or ones."""
    if NORMALISE:
        total = tl.sum(tiles[0].to(tl.float32) * tiles[0].to(tl.float32), 1)
        for i in tl.static_range(1, NK):
            total += tl.sum(tiles[i].to(tl.float32) * tiles[i].to(tl.float32), 1)
        return tl.rsqrt(total + 1e-6)
    else:
        return tl.sum(tiles[0].to(tl.float32) * 0.0, 1) + 1.0


@triton.jit
def inner(x, y, NK: tl.constexpr):
    """x yᵀ of tiles in their own type: (R, BK) and (S, BK) → (R, S)."""
    out = dot(x[0], tl.trans(y[0]))
    for i in tl.static_range(1, NK):
        out = dot(x[i], tl.trans(y[i]), out)
    return out


@triton.jit
def read(state, x, dtype: tl.constexpr, EXACT: tl.constexpr, NK: tl.constexpr):
    """Sᵀ xᵀ: what rows x (R, BK) read from a state of tiles (BV, BK) → (BV, R)."""
    out = product(state[0], tl.trans(x[0]), dtype, EXACT)
    for i in tl.static_range(1, NK):
        out += product(state[i], tl.trans(x[i]), dtype, EXACT)
    return out
