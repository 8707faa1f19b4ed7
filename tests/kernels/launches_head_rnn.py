"""Launches of the head_rnn kernels, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.head_rnn.cells import CELLS
from riverrun.kernels.head_rnn.triton_op import backward, forward


def run(cell, K, dtype=torch.bfloat16):
    G = len(CELLS[cell].gates)
    gates, weight = torch.zeros(2, 8, G, 3, K, dtype=dtype), torch.zeros(G, 3, K, K, dtype=dtype)
    h, _, states = forward(gates, weight, None, None, cell, True)
    backward(h, None, gates, weight, None, None, h, states, cell)


def launch_lstm():
    for K in (16, 64, 128):
        run("lstm", K)


def launch_slstm():
    run("slstm", 64)


def launch_gru():
    run("gru", 64)


def launch_elman():
    run("elman", 64)


def launch_single_precision():
    run("lstm", 64, torch.float32)
