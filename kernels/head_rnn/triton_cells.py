"""The cells of `head_rnn` for the Triton kernels: one step forward, and one step back.

The same functions as in `cells.py`, which tells what they take and give.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_math import exp, log_sigmoid, sigmoid, tanh


@triton.jit
def lstm_step(state, u, rec):
    c = sigmoid(u[1] + rec[1]) * state[0] + sigmoid(u[0] + rec[0]) * tanh(u[2] + rec[2])
    return c, sigmoid(u[3] + rec[3]) * tanh(c)


@triton.jit
def lstm_back(state, u, rec, grad):
    i, f, o = sigmoid(u[0] + rec[0]), sigmoid(u[1] + rec[1]), sigmoid(u[3] + rec[3])
    z = tanh(u[2] + rec[2])
    tanh_c = tanh(f * state[0] + i * z)
    grad_c = grad[0] + grad[1] * o * (1.0 - tanh_c * tanh_c)
    by_u = (
        grad_c * z * i * (1.0 - i),
        grad_c * state[0] * f * (1.0 - f),
        grad_c * i * (1.0 - z * z),
        grad[1] * tanh_c * o * (1.0 - o),
    )
    return by_u, by_u, (grad_c * f, tl.zeros_like(i))


@triton.jit
def _slstm(state, u, rec):
    c, n, m = state[0], state[1], state[2]
    i = u[0] + rec[0]
    log_f = log_sigmoid(u[1] + rec[1]) + m
    from_i = (n == 0.0) | (i >= log_f)
    new_m = tl.where(from_i, i, log_f)
    keep = tl.where(n == 0.0, 0.0, exp(log_f - new_m))
    add = exp(i - new_m)
    z = tanh(u[2] + rec[2])
    return keep, add, z, sigmoid(u[3] + rec[3]), keep * c + add * z, keep * n + add, new_m, from_i


@triton.jit
def slstm_step(state, u, rec):
    _, _, _, o, c, n, m, _ = _slstm(state, u, rec)
    n = tl.maximum(n, 1.0)
    return c, n, m, o * (c / n)


@triton.jit
def slstm_back(state, u, rec, grad):
    keep, add, z, o, c, free_n, _, from_i = _slstm(state, u, rec)
    n = tl.maximum(free_n, 1.0)
    ratio = c / n
    grad_c = grad[0] + grad[3] * o / n
    grad_n = tl.where(free_n >= 1.0, grad[1] - grad[3] * o * ratio / n, 0.0)
    grad_keep = (grad_c * state[0] + grad_n * state[1]) * keep
    grad_add = (grad_c * z + grad_n) * add
    grad_m = grad[2] - grad_keep - grad_add
    grad_i = grad_add + tl.where(from_i, grad_m, 0.0)
    grad_log_f = grad_keep + tl.where(from_i, 0.0, grad_m)
    by_u = (
        grad_i,
        grad_log_f * sigmoid(-u[1] - rec[1]),
        grad_c * add * (1.0 - z * z),
        grad[3] * ratio * o * (1.0 - o),
    )
    return by_u, by_u, (grad_c * keep, grad_n * keep, grad_log_f, tl.zeros_like(o))


@triton.jit
def gru_step(state, u, rec):
    r, z = sigmoid(u[0] + rec[0]), sigmoid(u[1] + rec[1])
    n = tanh(u[2] + r * rec[2])
    return (n + z * (state[0] - n),)


@triton.jit
def gru_back(state, u, rec, grad):
    r, z = sigmoid(u[0] + rec[0]), sigmoid(u[1] + rec[1])
    n = tanh(u[2] + r * rec[2])
    grad_n = grad[0] * (1.0 - z) * (1.0 - n * n)
    grad_r = grad_n * rec[2] * r * (1.0 - r)
    grad_z = grad[0] * (state[0] - n) * z * (1.0 - z)
    return (grad_r, grad_z, grad_n), (grad_r, grad_z, grad_n * r), (grad[0] * z,)


@triton.jit
def elman_step(state, u, rec):
    return (tanh(u[0] + rec[0]),)


@triton.jit
def elman_back(state, u, rec, grad):
    h = tanh(u[0] + rec[0])
    by_u = (grad[0] * (1.0 - h * h),)
    return by_u, by_u, (tl.zeros_like(h),)
