"""Launches of the para_gru and para_lstm kernels, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.common.triton_shooting import Launch, solve, solve_backward
from riverrun.kernels.common.triton_slope import compute_slope
from riverrun.kernels.para_gru.triton_cell import GRU_CELL
from riverrun.kernels.para_lstm.triton_cell import LSTM_CELL

CELLS = {"para_gru": GRU_CELL, "para_lstm": LSTM_CELL}


def run(op, B, T, D, packed, initial):
    cell = CELLS[op]
    K = cell.num_states
    gates = torch.zeros(B, T, 3, D, dtype=torch.bfloat16)
    weight, bias = torch.zeros(cell.num_weights, D), torch.zeros(3, D)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    state = torch.zeros(1 if packed else B, K, D) if initial else None
    launch = Launch.for_gates(gates, None)
    h, _, check = solve(op, cell, gates, weight, bias, state, cu_seqlens, launch, 1e-5, 8, True)
    solve_backward(cell, h, None, gates, weight, bias, state, cu_seqlens, check, launch, 1e-5)


def launch_gru():
    run("para_gru", 8, 4096, 2048, False, False)


def launch_gru_packed():
    run("para_gru", 1, 32768, 2048, True, False)


def launch_lstm():
    run("para_lstm", 8, 4096, 2048, False, False)


def launch_lstm_of_odd_shape():
    run("para_lstm", 2, 333, 100, False, True)


def launch_gru_slope():
    compute_slope(GRU_CELL, torch.zeros(1, 1024, 3, 2048, dtype=torch.bfloat16), torch.zeros(3, 2048), None, None)


def launch_lstm_slope_packed():
    cu_seqlens = torch.tensor([0, 1024], dtype=torch.int32)
    gates = torch.zeros(1, 1024, 3, 2048, dtype=torch.bfloat16)
    compute_slope(LSTM_CELL, gates, torch.zeros(5, 2048), torch.zeros(3, 2048), cu_seqlens)
