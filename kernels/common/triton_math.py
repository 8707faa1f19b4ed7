"""Nonlinearities in float32 for Triton kernels, through one exponential and one reciprocal each; matrix products.

Absolute errors are about 1e-7 everywhere, which is what a recurrent state needs; the hardware's own tanh errs by 5e-4.
No argument gives NaN: the exponential underflows to 0 or saturates at infinity, whose reciprocal is 0.

The step of a recurrence is a chain of dependent instructions, so each one counts. PTX's flushing instructions are one
machine instruction each; Triton's own `exp` and `/` are seven more, which only matter for denormal numbers.
"""

import triton
import triton.language as tl
from triton import knobs

# the interpreter knows no PTX
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def exp(x):
    """e^x."""
    return _exp2(x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^−x)."""
    return reciprocal(1.0 + _exp2(x * -1.4426950408889634))


@triton.jit
def tanh(x):
    """2 σ(2x) − 1."""
    return 2.0 * reciprocal(1.0 + _exp2(x * -2.8853900817779268)) - 1.0


@triton.jit
def log_sigmoid(x):
    """log σ(x) = min(x, 0) − log(1 + e^−|x|)."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + exp(-tl.abs(x)))


@triton.jit
def dot(a, b, acc=None, EXACT: tl.constexpr = True):
    """a b (+ acc) of two matrices of one type, with sums in float32. Operands in float32 are cut to 11 bits if not
    EXACT."""
    if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
        out = tl.dot(a.to(tl.float32), b.to(tl.float32))
        if acc is not None:
            out += acc
        return out
    return tl.dot(a, b, acc, input_precision="tf32x3" if EXACT else "tf32")
