"""Launches of the fused gated layer of a memory, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.neural_memory.triton_gated import run_gated, run_gradients, run_second


def launch_gated():
    for dtype in (torch.bfloat16, torch.float32):
        for activation in ("gelu", "silu"):
            x = torch.zeros(4, 4096, dtype=dtype)
            run_gated(x, x, activation)
            run_gradients(x, x, x, activation)
            run_second(x, x, x, x, x, activation)
