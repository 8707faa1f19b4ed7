"""Launches of the kernels of gates from logits, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.memory_gates.triton_gates import gates, gates_backward


def run(*shape, momentum=True, shrink=True, dtype=torch.bfloat16):
    N = shape[2]
    logits = [torch.zeros(*shape[:2], 3 * N, dtype=dtype)[..., i * N : (i + 1) * N] for i in range(3)]
    biases = [torch.zeros(N) for _ in range(3)]
    if not momentum:
        logits[2] = biases[2] = None
    made = gates(*logits, *biases, 0.5, shrink)
    gates_backward(*made[:2], made[2] if momentum else None, *logits, *biases, 0.5, shrink)


def launch_heads():
    run(8, 4096, 16)


def launch_layers_of_heads_without_shrinking():
    run(8, 4096, 48, shrink=False)


def launch_without_momentum():
    run(2, 333, 5, momentum=False, dtype=torch.float32)


def launch_many():
    run(8, 4096, 100)


def launch_one_step():
    run(64, 1, 16)
