"""Launches of the two-layer memory's kernels, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.neural_memory.triton_mlp import walk, walk_back


def run(B, T, H, K, F, V, C, momentum=True, norm=True, silu=False, packed=False, save="root", dtype=torch.bfloat16):
    q, k, v = (torch.zeros(B, T, H, size, dtype=dtype) for size in (K, K, V))
    M, P = B * -(-T // C) + packed, 1 + momentum
    gates = [torch.zeros(M, H, *shape) for shape in ((P, C), (C, C), (2 * P - 1,), (P, C))] * 2
    gain = torch.zeros(H, V) if norm else None
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    rest = gain, torch.zeros(B, H, P, F * (K + V)), cu_seqlens, silu, K == V, save, T
    o, final, *saved = walk(q, k, v, gates, *rest)
    walk_back(o, final, q, k, v, gates, *rest[:2], *saved, *rest[2:])


def launch_titans():
    run(8, 4096, 16, 128, 512, 128, 64)


def launch_without_momentum():
    run(8, 4096, 16, 128, 512, 128, 64, momentum=False)


def launch_short_chunks_packed():
    run(1, 4096, 16, 64, 256, 64, 16, norm=False, silu=True, packed=True)


def launch_padded_heads():
    run(2, 512, 4, 96, 384, 128, 32, norm=False)


def launch_single_precision():
    run(2, 512, 4, 64, 128, 64, 32, dtype=torch.float32)


def launch_titans_all_states():
    run(8, 4096, 16, 128, 512, 128, 64, save="all")


def launch_without_momentum_all_states():
    run(8, 4096, 16, 128, 512, 128, 64, momentum=False, save="all")


def launch_short_chunks_packed_all_states():
    run(1, 4096, 16, 64, 256, 64, 16, norm=False, silu=True, packed=True, save="all")
