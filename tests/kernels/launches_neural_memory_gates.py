"""Launches of the kernels of a memory's gates, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.neural_memory.rule import Gates
from riverrun.kernels.neural_memory.triton_gates import Launch


def run(chunk, H=16, momentum=True, packed=False):
    gates = torch.zeros(1, 512, H)
    cu_seqlens = torch.tensor([0, 512], dtype=torch.int32) if packed else None
    launch = Launch(Gates(gates, gates, gates if momentum else None), chunk, cu_seqlens)
    launch.backward(launch.forward())


def launch_chunks():
    for chunk in (16, 32, 64, 128):
        run(chunk)


def launch_without_momentum():
    run(64, momentum=False)


def launch_packed():
    run(16, H=3, packed=True)
    run(128, H=6, packed=True)
