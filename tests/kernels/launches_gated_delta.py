"""Launches of the gated delta rule's kernels, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.gated_delta.triton_op import delta, delta_backward


def run(B, T, n, H, K, V, exact, packed=False, states=False, dtype=torch.bfloat16):
    q, k, v = (torch.zeros(*shape, dtype=dtype) for shape in ((B, T, H, K), (B, T, n, H, K), (B, T, n, H, V)))
    beta, g = torch.zeros(B, T, n, H), torch.zeros(B, T, H)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    state = torch.zeros(B, H, K, V) if states else None
    o, _ = delta(q, k, v, beta, g, 1.0, True, state, cu_seqlens, exact)
    delta_backward(o, state, q, k, v, beta, g, 1.0, True, state, cu_seqlens, exact)


def launch_gated_deltanet():
    run(8, 4096, 1, 16, 128, 128, False)


def launch_olmo_heads():
    run(8, 4096, 1, 30, 96, 192, True)


def launch_three_steps_packed():
    run(1, 4096, 3, 16, 128, 128, False, packed=True)


def launch_two_steps_of_a_long_row_from_a_state():
    run(1, 8192, 2, 4, 128, 128, True, states=True)


def launch_wide_heads():
    run(8, 4096, 1, 6, 256, 256, False)
