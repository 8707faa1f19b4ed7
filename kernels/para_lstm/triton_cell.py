"""The ParaLSTM cell for the Triton solver (`riverrun.kernels.common.triton_solve`); derivatives as in `chunked.py`."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it

from riverrun.kernels.common.triton_math import sigmoid, tanh
from riverrun.kernels.common.triton_shooting import TritonCell, define_triton_op
from riverrun.kernels.common.triton_slope import define_triton_slope
from riverrun.kernels.para_lstm.chunked import para_lstm_chunked


@triton.jit
def activate(state, u, w):
    """Tuples: state (c, h), pre-activations (u_f, u_o, u_c), weights (a_f, a_o, a_c, c_f, c_o) → what the derivatives
    need."""
    c, h = state
    f = sigmoid(w[0] * h + (w[3] * c + u[0]))
    q = tanh(w[2] * h + u[2])
    new_c = q + f * (c - q)
    o = sigmoid(w[1] * h + (w[4] * new_c + u[1]))
    return c, h, f, q, o, new_c, tanh(new_c)


@triton.jit
def new_state(kept):
    return kept[5], kept[4] * kept[6]


@triton.jit
def _by_gates(kept, w):
    """∂c/∂u_f, ∂h/∂u_o, ∂c/∂u_c, and ∂h/∂c."""
    c, h, f, q, o, new_c, tanh_c = kept  # noqa: RUF059
    by_o = tanh_c * (o - o * o)
    return (c - q) * (f - f * f), by_o, (1.0 - f) * (1.0 - q * q), o * (1.0 - tanh_c * tanh_c) + w[4] * by_o


@triton.jit
def jacobian(kept, w):
    """(∂c/∂c₋, ∂c/∂h₋, ∂h/∂c₋, ∂h/∂h₋)."""
    by_f, by_o, by_c, h_by_c = _by_gates(kept, w)
    cc = kept[2] + w[3] * by_f
    ch = w[0] * by_f + w[2] * by_c
    return cc, ch, h_by_c * cc, h_by_c * ch + w[1] * by_o


@triton.jit
def gradients(adjoint, kept, w):
    """dL/d(c, h) → the gradients of the pre-activations, and this step's share of those of the weights."""
    by_f, by_o, by_c, h_by_c = _by_gates(kept, w)
    total_c = adjoint[0] + h_by_c * adjoint[1]
    g_f, g_o, g_c = total_c * by_f, adjoint[1] * by_o, total_c * by_c
    return (g_f, g_o, g_c), (g_f * kept[1], g_o * kept[1], g_c * kept[1], g_f * kept[0], g_o * kept[5])


LSTM_CELL = TritonCell(2, 3, 5, activate, new_state, jacobian, gradients)

para_lstm_triton = define_triton_op("para_lstm", LSTM_CELL, para_lstm_chunked)
para_lstm_slope_triton = define_triton_slope("para_lstm", LSTM_CELL, para_lstm_chunked)
