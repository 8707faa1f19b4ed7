"""Launches of a linear neural memory's kernels, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.neural_memory.gates import ChunkGates
from riverrun.kernels.neural_memory.triton_linear_launch import Pair, Settings
from riverrun.kernels.neural_memory.triton_linear_op import memory, memory_backward


def run(
    B, T, H, K, V, chunk, online, late=False, momentum=True, packed=False, states=True, saved=False,
    dtype=torch.bfloat16,
):  # fmt: skip
    q, k, v = (torch.zeros(B, T, H, size, dtype=dtype) for size in (K, K, V))
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    chunks = (T // chunk + 1) if packed else B * T // chunk
    of_momentum = [torch.zeros(chunks, H, *shape) for shape in ((chunk,), (), (chunk,))] if momentum else [None] * 3
    gates = ChunkGates(torch.zeros(chunks, H, chunk), torch.zeros(chunks, H, chunk, chunk), *of_momentum)
    W, S = torch.zeros(2, B, H, K, V)
    initial, settings = Pair(W, S if momentum and states else None), Settings(chunk, online, late)
    memory(q, k, v, gates, initial, cu_seqlens, settings, save=False)
    finals = initial if states else Pair(None, None)
    memory_backward(v, finals, q, k, v, gates, initial, cu_seqlens, settings, None)
    if saved:
        memory(q, k, v, gates, initial, cu_seqlens, settings, save=True)


def launch_titans():
    run(8, 512, 16, 128, 128, 64, online=True, states=False, saved=True)


def launch_titans_packed_from_states():
    run(1, 512, 16, 128, 128, 64, online=True, late=True, packed=True)


def launch_anchored():
    run(8, 512, 16, 128, 128, 64, online=False)


def launch_without_momentum():
    run(8, 512, 16, 128, 128, 64, online=True, momentum=False)


def launch_anchored_without_momentum():
    run(8, 512, 16, 64, 64, 64, online=False, late=True, momentum=False)


def launch_uneven_heads():
    run(8, 512, 16, 96, 192, 64, online=True)


def launch_wide_heads():
    run(2, 512, 6, 256, 256, 64, online=True, saved=True)


def launch_long_chunks():
    run(2, 512, 6, 256, 256, 128, online=False)


def launch_single_precision():
    run(2, 512, 6, 256, 256, 64, online=True, dtype=torch.float32)
