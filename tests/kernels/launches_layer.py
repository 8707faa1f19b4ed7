"""Launches of the kernels around the recurrences, to be compiled without a GPU (see `compiling.py`)."""

import torch

from riverrun.kernels.causal_conv1d.triton_op import convolve, convolve_backward
from riverrun.kernels.gated_rms_norm.triton_norm import norm, norm_backward
from riverrun.kernels.linear_cross_entropy.triton_softmax import log_z, softmax_gradient


def convolution(B, T, D, W=4, packed=False, states=False, dtype=torch.bfloat16):
    x, weight, bias = torch.zeros(B, T, D, dtype=dtype), torch.zeros(D, W), torch.zeros(D)
    cu_seqlens = torch.tensor([0, 1, T], dtype=torch.int32) if packed else None
    initial = x.new_zeros(2 if packed else B, W - 1, D) if states else None
    convolve(x, weight, bias, True, initial, cu_seqlens)
    convolve_backward(x, initial, x, weight, bias, True, initial, cu_seqlens)


def launch_convolution():
    convolution(8, 4096, 2048)


def launch_convolution_of_documents():
    convolution(1, 32768, 2048, packed=True)


def launch_convolution_of_documents_with_states():
    convolution(1, 32768, 2048, packed=True, states=True)


def launch_convolution_of_eight_taps():
    convolution(8, 4096, 2048, W=8)


def launch_convolution_of_one_tap_and_odd_shape():
    convolution(2, 333, 100, W=1, states=True, dtype=torch.float32)


def launch_convolution_of_one_step():
    convolution(64, 1, 2048, states=True)


def gated_norm(*shape, groups=1, norm_before_gate=False, gated=True):
    x, weight = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape[-1])
    gate = x if gated else None
    _, rstd = norm(x, gate, weight, 1e-5, groups, norm_before_gate)
    norm_backward(x, x, gate, weight, rstd, groups, norm_before_gate)


def launch_norm_before_gate():
    gated_norm(8, 4096, 2048, norm_before_gate=True)


def launch_norm_after_gate():
    gated_norm(8, 4096, 2048)


def launch_norm_of_groups():
    gated_norm(8, 4096, 4096, groups=8)


def launch_norm_of_heads():
    gated_norm(8, 4096, 16, 192, norm_before_gate=True)


def launch_norm_without_gate():
    gated_norm(8, 4096, 2560, gated=False)


def launch_norm_of_many_channels():
    gated_norm(2, 512, 8192)


def launch_norm_of_the_most_channels():
    gated_norm(2, 512, 16384)


def launch_32k_vocabulary():
    logits, targets, row = torch.zeros(64, 32000), torch.zeros(64, dtype=torch.int64), torch.zeros(64)
    log_z(logits, targets)
    softmax_gradient(logits, targets, row, row, row, torch.bfloat16)
