"""Launches of convolutions whose outputs have unit length, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.causal_conv1d.triton_op import convolve, convolve_backward


def convolution(B, T, D, unit, packed=False, states=False, dtype=torch.bfloat16):
    x, weight = torch.zeros(B, T, D, dtype=dtype), torch.zeros(D, 4)
    cu_seqlens = torch.tensor([0, 1, T], dtype=torch.int32) if packed else None
    initial = x.new_zeros(2 if packed else B, 3, D) if states else None
    convolve(x, weight, None, True, initial, cu_seqlens, unit)
    convolve_backward(x, initial, x, weight, None, True, initial, cu_seqlens, unit)


def launch_heads_of_128():
    convolution(8, 4096, 2048, 128)


def launch_heads_of_64_of_documents_with_states():
    convolution(1, 32768, 2048, 64, packed=True, states=True)


def launch_heads_of_512():
    convolution(8, 4096, 2048, 512)


def launch_the_widest_heads():
    convolution(8, 4096, 2048, 1024)


def launch_heads_of_96():
    convolution(8, 4096, 1536, 96)


def launch_few_tokens():
    convolution(1, 4, 2048, 128)


def launch_one_step():
    convolution(64, 1, 2048, 128, states=True)
