"""Launches of the ssd kernels, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.ssd.triton_op import scan, scan_backward


def run(B, T, H, P, G, N, packed=False, D=True, dtype=torch.bfloat16):
    x, BC = torch.zeros(B, T, H, P, dtype=dtype), torch.zeros(2, B, T, G, N, dtype=dtype)
    dt, A, skip = torch.zeros(B, T, H), torch.zeros(H), torch.zeros(H) if D else None
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    y, _ = scan(x, dt, A, *BC, skip, None, cu_seqlens)
    scan_backward(y, None, x, dt, A, *BC, skip, None, cu_seqlens)


def launch_mamba2():
    run(8, 4096, 64, 64, 1, 128)


def launch_one_long_row():
    run(1, 8192, 24, 64, 8, 128, packed=True)


def launch_wide():
    run(2, 4096, 16, 128, 1, 256, D=False)


def launch_single_precision():
    run(2, 4096, 24, 64, 1, 128, dtype=torch.float32)
