"""Launches of the passes over long chunks of a gated memory, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.neural_memory import long_chunks_walk
from riverrun.kernels.neural_memory.long_chunks_walk import walk, walk_back
from riverrun.kernels.neural_memory.triton_long_gates import run_backward, run_forward

long_chunks_walk.fused = lambda x: True


def launch_chunks():
    """Of both kinds of numbers, with and without a momentum, of both activations, of one and of several rows."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, width, P, silu in (
        (bf16, 512, 2, True),
        (bf16, 512, 1, False),
        (fp32, 512, 2, False),
        (bf16, 96, 2, True),
    ):
        B, T, H, b = 1, 32, 2, 16
        q, k, v = (torch.zeros(B, T, H, width, dtype=dtype) for _ in range(3))
        writes, ends = torch.zeros(1, P, B, T, H), torch.zeros(1, 2 * P - 1, B, T // b, H)
        state = torch.zeros(B * H, width, P, 2, width), torch.zeros(B * H, width, P, 1, width)
        options = b, silu, True
        o, final, room = walk(q, k, v, writes, ends, state, *options, save=True)
        walk_back(o, final, writes, ends, state, room, *options)
        walk_back(o, None, writes, ends, state, room, *options)
        for gates_chunk in (T - 4, 4096):
            gates = torch.zeros(1, B, gates_chunk + 4, H)
            log_momentum = gates if P == 2 else None
            writes, ends, kept = run_forward(gates, gates, log_momentum, gates_chunk)
            run_backward(writes, ends, gates, log_momentum, ends, kept, gates_chunk)
