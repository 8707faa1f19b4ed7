"""Tuples of tensors as small vectors and matrices (row-major)."""

import triton
import triton.language as tl


@triton.jit
def add(x, y):
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] + y[i],)
    return out


@triton.jit
def subtract(x, y):
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] - y[i],)
    return out


@triton.jit
def select(condition, x, y):
    """x where the condition holds, y elsewhere."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (tl.where(condition, x[i], y[i]),)
    return out


@triton.jit
def keep(condition, x):
    """x where the condition holds, 0 elsewhere."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (tl.where(condition, x[i], 0.0),)
    return out


@triton.jit
def cut(x):
    """To [−1, 1]; what is not a number, to 0."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (tl.where(x[i] == x[i], tl.minimum(tl.maximum(x[i], -1.0), 1.0), 0.0),)
    return out


@triton.jit
def total(x):
    """Σ |x_i|; not a number if any of them is not."""
    out = tl.abs(x[0])
    for i in tl.static_range(1, len(x)):
        out += tl.abs(x[i])
    return out


@triton.jit
def largest(x):
    """max |x_i|."""
    out = tl.abs(x[0])
    for i in tl.static_range(1, len(x)):
        out = tl.maximum(out, tl.abs(x[i]))
    return out


@triton.jit
def zeros(like, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros_like(like),)
    return out


@triton.jit
def identity(like, K: tl.constexpr):
    out = ()
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            out = out + (tl.zeros_like(like) + (1.0 if i == j else 0.0),)
    return out


@triton.jit
def multiply(X, Y, K: tl.constexpr):
    """X Y of K × K matrices."""
    out = ()
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            x = X[i * K] * Y[j]
            for k in tl.static_range(1, K):
                x += X[i * K + k] * Y[k * K + j]
            out = out + (x,)
    return out


@triton.jit
def transpose(X, K: tl.constexpr):
    out = ()
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            out = out + (X[j * K + i],)
    return out


@triton.jit
def apply(X, v, K: tl.constexpr):
    """X v."""
    out = ()
    for i in tl.static_range(K):
        x = X[i * K] * v[0]
        for k in tl.static_range(1, K):
            x += X[i * K + k] * v[k]
        out = out + (x,)
    return out


@triton.jit
def from_row_before(x, row, exchange, C: tl.constexpr, BD: tl.constexpr):
    """Tensors (C, BD) moved on by one row, zero in the first; `row` (C, 1) counts them.

    Through memory: `exchange` points to room for them. Triton's `gather` does it on chip, but lays all of a kernel's
    tensors out to suit itself, so that every load of the caller's would be shuffled.
    """
    place = exchange + row * BD + tl.arange(0, BD)[None, :]
    for i in tl.static_range(len(x)):
        tl.store(place + i * (C * BD), x[i])
    tl.debug_barrier()
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (tl.load(place + (i * C - 1) * BD, mask=tl.broadcast_to(row > 0, [C, BD]), other=0.0),)
    tl.debug_barrier()
    return out


@triton.jit
def _then1(a, x, b, y):
    return b * a, b * x + y


@triton.jit
def _then2(a0, a1, a2, a3, x0, x1, b0, b1, b2, b3, y0, y1):
    return (
        b0 * a0 + b1 * a2,
        b0 * a1 + b1 * a3,
        b2 * a0 + b3 * a2,
        b2 * a1 + b3 * a3,
        b0 * x0 + b1 * x1 + y0,
        b2 * x0 + b3 * x1 + y1,
    )


@triton.jit
def carry_over_rows(A, d, K: tl.constexpr):
    """e (rows, …) with e_s = A_s e_{s−1} + d_s."""
    if K == 1:
        _, e = tl.associative_scan((A[0], d[0]), 0, _then1)
        return (e,)
    else:
        tl.static_assert(K == 2)
        _, _, _, _, e0, e1 = tl.associative_scan((A[0], A[1], A[2], A[3], d[0], d[1]), 0, _then2)
        return (e0, e1)
