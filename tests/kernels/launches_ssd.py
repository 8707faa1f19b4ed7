"""Launches of the ssd kernels, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.ssd.triton_op import scan, scan_backward


def run(B, T, H, P, G, N, packed=False, D=True, raw=True, initial=False, dtype=torch.bfloat16):
    """`raw` step sizes are of a bias and a softplus."""
    x, BC = torch.zeros(B, T, H, P, dtype=dtype), torch.zeros(2, B, T, G, N, dtype=dtype)
    A, bias, skip = torch.zeros(H), torch.zeros(H) if raw else None, torch.zeros(H) if D else None
    dt = torch.zeros(B, T, H, dtype=dtype if raw else torch.float32)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    state = torch.zeros(B, H, P, N) if initial else None
    inputs = (x, dt, A, *BC, skip, bias, state, cu_seqlens, raw)
    y, _ = scan(*inputs)
    scan_backward(y, state, *inputs)


def launch_mamba2():
    run(8, 4096, 64, 64, 1, 128)


def launch_steps_made_before():
    run(8, 4096, 64, 64, 1, 128, raw=False)


def launch_one_long_row():
    run(1, 8192, 24, 64, 8, 128, packed=True)


def launch_one_long_row_from_a_state():
    run(1, 8192, 24, 64, 8, 128, initial=True)


def launch_wide():
    run(2, 4096, 16, 128, 1, 256, D=False)


def launch_single_precision():
    run(2, 4096, 24, 64, 1, 128, dtype=torch.float32)
