"""The step sizes Δ = softplus(dt + bias) of a chunk, made in registers from what a projection left.

The walks carry the next chunk's dt along in a register: a load of two bytes is not one of those that the compiler
starts ahead of time, and each chunk would wait for it.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_math import exp, sigmoid


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + ε) with ε = e^−|x|, to a relative 1e-5 also where it is next to nothing.

    log(1 + ε) = 2 artanh(s), s = ε / (2 + ε) ≤ 1/3: what is left out of the series is below 2e-8 of it.
    """
    e = exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    series = 1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def load_bias(dt_bias, h, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.load(dt_bias + h)
    else:
        return 0.0


@triton.jit
def load_dt(dt, begin, at, tokens, step, STRIDE: tl.constexpr):
    """dt as it came, of the chunk `at` tokens into a sequence that begins at token `begin`; zeros if it has no such."""
    mask = (step + at >= 0) & (step < tokens - at)
    return tl.load(dt + (begin + at) * STRIDE + step * STRIDE, mask=mask, other=0.0)


@triton.jit
def _add_and_keep(sum_before, _, a, d):
    return sum_before + a, d


@triton.jit
def step_sizes(raw, bias, rate, step, here, Q: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Of a chunk of one head: Δ, a and a_Q, from `raw` dt. Where there are no tokens Δ = 0, and a stays as it is.

    Δ, too, comes out of the scan: the compiler makes again what it has made, for each arrangement of threads.
    """
    d = raw.to(tl.float32) + bias
    if SOFTPLUS:
        d = softplus(d)
    d = tl.where(here, d, 0.0)
    a, d = tl.associative_scan((d * rate, d), 0, _add_and_keep)
    return d, a, tl.sum(tl.where(step == Q - 1, a, 0.0), 0)  # no other sum: it would round in another way


@triton.jit
def through_softplus(by_step, dt, token, tokens, step, bias, STRIDE: tl.constexpr, SOFTPLUS: tl.constexpr):
    """From the gradient of Δ, of a chunk that begins at `token`, that of dt: softplus' = σ."""
    if SOFTPLUS:
        return by_step * sigmoid(load_dt(dt, token, 0, tokens, step, STRIDE).to(tl.float32) + bias)
    else:
        return by_step
