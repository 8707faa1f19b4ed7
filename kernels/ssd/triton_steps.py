"""The step sizes Δ = softplus(dt + bias) of all chunks and what follows from them, made before the walks and once; and,
after them, the gradients of dt, A and the bias.

A walk that made them would wait in each chunk: for a load of two bytes a token, a softplus, and a sum over tokens that
goes through memory between threads. They are 8 bytes a token and head, next to nothing.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
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
def _raw(dt, dt_bias, token, tokens, head, step, H: tl.constexpr, DT_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """dt + bias (BH, Q), and where there are such heads and tokens."""
    here = (head < H)[:, None] & (step < tokens)[None, :]
    p = dt + (token + step[None, :]) * DT_STRIDE + head[:, None]
    raw = tl.load(p, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + head, mask=head < H, other=0.0)[:, None]
    return raw, here


@triton.jit
def steps_kernel(
    dt,  # (B, T, H)
    dt_bias,  # (H,) float32
    A,  # (H,) float32
    steps,  # (M, H, Q) float32: Δ, zero where there are no tokens
    decays,  # (M, H, Q) float32: a, the sum of Δ A from the chunk's start
    start,
    length,
    T,
    H: tl.constexpr,
    DT_STRIDE: tl.constexpr,  # from token to token
    Q: tl.constexpr,
    BH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
):
    c, head, step = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, Q)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    if tokens > 0:
        d, here = _raw(dt, dt_bias, token, tokens, head, step, H, DT_STRIDE, HAS_BIAS)
        if SOFTPLUS:
            d = softplus(d)
        d = tl.where(here, d, 0.0)
        a = tl.cumsum(d * tl.load(A + head, mask=head < H, other=0.0)[:, None], 1)
        place = (tl.cast(c, tl.int64) * H + head)[:, None] * Q + step[None, :]
        tl.store(steps + place, d, mask=(head < H)[:, None])
        tl.store(decays + place, a, mask=(head < H)[:, None])


@triton.jit
def steps_backward_kernel(
    dt,  # (B, T, H)
    dt_bias,  # (H,) float32
    A,  # (H,) float32
    steps,  # (M, H, Q) float32
    decays,  # (M, H, Q) float32
    by_read,  # (M, H, Q) float32: of a, from the reading of the chunk's first state
    flow,  # (M, H) float32: ⟨dH, H⟩
    by_a,  # (M, H, Q) float32: of a, from within the chunk
    by_d,  # (M, H, Q) float32: of Δ, the same
    by_written,  # (M, H, Q) float32: of Δ, from what the chunk writes
    grad_dt,  # (B, T, H)
    grad_bias,  # (M, H) float32
    grad_A,  # (M, H) float32
    start,
    length,
    T,
    H: tl.constexpr,
    DT_STRIDE: tl.constexpr,
    Q: tl.constexpr,
    BH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
):
    c, head, step = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, Q)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    if tokens > 0:
        raw, here = _raw(dt, dt_bias, token, tokens, head, step, H, DT_STRIDE, HAS_BIAS)
        index = tl.cast(c, tl.int64) * H + head
        place, there = index[:, None] * Q + step[None, :], (head < H)[:, None]
        d = tl.load(steps + place, mask=there, other=0.0)
        end = tl.load(decays + index * Q + Q - 1, mask=head < H, other=0.0)
        of_written = tl.load(by_written + place, mask=there, other=0.0)
        of_a = tl.load(by_read + place, mask=there, other=0.0) + tl.load(by_a + place, mask=there, other=0.0)
        # Δ A of a token enters every a from it on, and with e^{a_Q − a} what the tokens before it have written
        kept = tl.load(flow + index, mask=head < H, other=0.0) * exp(end)
        before = of_written * d
        by_rate = tl.sum(of_a, 1)[:, None] - tl.cumsum(of_a, 1) + of_a + kept[:, None] + tl.cumsum(before, 1) - before
        tl.store(grad_A + index, tl.sum(by_rate * d, 1), mask=head < H)
        rate = tl.load(A + head, mask=head < H, other=0.0)[:, None]
        out = tl.load(by_d + place, mask=there, other=0.0) + of_written + by_rate * rate
        if SOFTPLUS:
            out *= sigmoid(raw)
        tl.store(grad_dt + (token + step[None, :]) * H + head[:, None], out.to(grad_dt.dtype.element_ty), mask=here)
        if HAS_BIAS:
            tl.store(grad_bias + index, tl.sum(tl.where(here, out, 0.0), 1), mask=head < H)
