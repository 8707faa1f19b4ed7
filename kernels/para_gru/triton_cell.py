"""The ParaGRU cell for the Triton solver (`riverrun.kernels.common.triton_solve`); derivatives as in `chunked.py`."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it

from riverrun.kernels.common.triton_math import sigmoid, tanh
from riverrun.kernels.common.triton_shooting import TritonCell, define_triton_op
from riverrun.kernels.common.triton_slope import define_triton_slope
from riverrun.kernels.para_gru.chunked import para_gru_chunked


@triton.jit
def activate(state, u, w):
    """Tuples: state (h,), pre-activations (u_z, u_r, u_n), weights (a_z, a_r, a_n) → what the derivatives need."""
    h = state[0]
    z = sigmoid(w[0] * h + u[0])
    r = sigmoid(w[1] * h + u[1])
    n = tanh(w[2] * (r * h) + u[2])
    return h, z, r, n


@triton.jit
def new_state(kept):
    h, z, r, n = kept  # noqa: RUF059 - Triton unpacks whole tuples
    return (h + z * (n - h),)


@triton.jit
def _by_gates(kept, w):
    """∂h/∂(u_z, u_r, u_n)."""
    h, z, r, n = kept
    by_n = z * (1.0 - n * n)
    return (n - h) * (z - z * z), by_n * w[2] * h * (r - r * r), by_n


@triton.jit
def jacobian(kept, w):
    """(∂h/∂h₋,)."""
    by_z, by_r, by_n = _by_gates(kept, w)
    return ((1.0 - kept[1]) + w[0] * by_z + w[1] * by_r + w[2] * by_n * kept[2],)


@triton.jit
def gradients(adjoint, kept, w):
    """dL/dh → the gradients of the pre-activations, and this step's share of those of the weights."""
    by_z, by_r, by_n = _by_gates(kept, w)
    h = kept[0]
    g_z, g_r, g_n = adjoint[0] * by_z, adjoint[0] * by_r, adjoint[0] * by_n
    return (g_z, g_r, g_n), (g_z * h, g_r * h, g_n * (kept[2] * h))


GRU_CELL = TritonCell(1, 3, 3, activate, new_state, jacobian, gradients)

para_gru_triton = define_triton_op("para_gru", GRU_CELL, para_gru_chunked)
para_gru_slope_triton = define_triton_slope("para_gru", GRU_CELL, para_gru_chunked)
