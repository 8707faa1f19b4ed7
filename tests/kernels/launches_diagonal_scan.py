"""Launches of the diagonal_scan kernels, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.diagonal_scan.triton_op import scan, scan_backward


def run(B, T, D, dtype, constant=False, packed=False, initial=False, final=False):
    x = torch.zeros(B, T, D, dtype=dtype)
    a = torch.zeros(D, dtype=dtype) if constant else torch.zeros_like(x)
    S = 1 if packed else B
    state = torch.zeros(S, D, dtype=torch.promote_types(dtype, torch.float32))
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    before = state if initial else None
    h, _, checkpoints = scan(x, a, before, cu_seqlens, True)
    scan_backward(h, state if final else None, h, a, before, cu_seqlens, checkpoints)


def launch_bfloat16():
    run(8, 4096, 2048, torch.bfloat16)


def launch_bfloat16_packed():
    run(1, 32768, 2048, torch.bfloat16, packed=True, initial=True, final=True)


def launch_one_chunk():
    run(64, 1024, 2048, torch.bfloat16)


def launch_float32():
    run(8, 4096, 1024, torch.float32)


def launch_float32_of_odd_shape():
    run(2, 333, 100, torch.float32, constant=True, initial=True)


def launch_complex():
    run(8, 4096, 1024, torch.complex64)


def launch_complex_packed():
    run(1, 32768, 1024, torch.complex64, packed=True, initial=True, final=True)


def launch_complex_decoding():
    run(4, 1, 1024, torch.complex64, constant=True, initial=True)
