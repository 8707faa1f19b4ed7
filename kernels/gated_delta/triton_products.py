"""Tiles of keys, and matrix products of them, in one of two precisions.

A head's K channels are NK tiles of BK, so that sizes that are not a power of two cost no padding. Keys and queries stay
as they came, in 16 bits; the factors that normalise them, gates and β are float32 and go to the other operand or to the
result, for a rounded unit key would no longer give a reflection.

With β ≤ 1 errors fade, and float32 operands may be rounded to 16 bits (PARTS = 1). With β up to 2 a step may be a
reflection, which keeps errors for ever: there operands are sums of three 16-bit numbers, and a product is three or six;
or of two for gradients, which are rounded to 16 bits in the end.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_math import dot


@triton.jit
def _parts(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """x as a sum of numbers of type `dtype`: three of them hold the 24 bits of float32."""
    if x.dtype == dtype or PARTS == 1:
        return (x.to(dtype),)
    else:
        high = x.to(dtype)
        return (high,) + _parts(x - high.to(tl.float32), dtype, PARTS - 1)


@triton.jit
def product(a, b, dtype: tl.constexpr, PARTS: tl.constexpr):
    """a b, of which either may be float32 where `dtype` is narrower."""
    a_parts, b_parts = _parts(a, dtype, PARTS), _parts(b, dtype, PARTS)
    out = dot(a_parts[0], b_parts[0])
    for i in tl.static_range(len(a_parts)):
        for j in tl.static_range(len(b_parts)):
            if i + j > 0 and i + j < PARTS:  # beyond lies what is lost anyway
                out = dot(a_parts[i], b_parts[j], out)
    return out


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
def load_tiles(p, row, here, STRIDE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr):
    """Rows `row` (R,) as NK tiles (R, BK)."""
    out = ()
    for i in tl.static_range(NK):
        out = out + (load_rows(p, row, here, STRIDE, i * BK + tl.arange(0, BK), K),)
    return out


@triton.jit
def store_tiles(p, tiles, row, here, STRIDE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr):
    """The inverse of `load_tiles`."""
    for i in tl.static_range(NK):
        store_rows(p, tiles[i], row, here, STRIDE, i * BK + tl.arange(0, BK), K)


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
def read(state, x, dtype: tl.constexpr, PARTS: tl.constexpr, NK: tl.constexpr):
    """Sᵀ xᵀ: what rows x (R, BK) read from a state of tiles (BV, BK) → (BV, R)."""
    out = product(state[0], tl.trans(x[0]), dtype, PARTS)
    for i in tl.static_range(1, NK):
        out += product(state[i], tl.trans(x[i]), dtype, PARTS)
    return out
