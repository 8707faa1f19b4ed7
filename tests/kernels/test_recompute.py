"""Every op's Triton kernels under activation checkpoints, which let a backward pass unpack what was saved only once."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.kernels.diagonal_scan import diagonal_scan
from riverrun.kernels.gated_delta import gated_delta
from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.kernels.head_rnn import head_rnn
from riverrun.kernels.linear_cross_entropy import linear_cross_entropy
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm
from riverrun.kernels.ssd import ssd

T, D = 20, 16


def calls():
    """By op: the call, and its inputs."""
    torch.manual_seed(0)
    draw = torch.randn
    x, keys, decay = draw(1, T, 2, 8), draw(1, T, 2, 2, 8), -torch.rand(1, T, 2)
    return {
        "ssd": (ssd, [x, -decay, -torch.rand(2), draw(1, T, 1, 8), draw(1, T, 1, 8), draw(2)]),
        "gated_delta": (
            partial(gated_delta, qk_l2norm=True),
            [x, keys, draw(1, T, 2, 2, 8), torch.rand(1, T, 2, 2), decay],
        ),
        "diagonal_scan": (diagonal_scan, [draw(1, T, D), torch.rand(1, T, D)]),
        "causal_conv1d": (partial(causal_conv1d, activation="silu"), [draw(1, T, D), draw(D, 4), draw(D)]),
        "gated_rms_norm": (gated_rms_norm, [draw(1, T, D), draw(1, T, D), draw(D)]),
        "linear_cross_entropy": (
            lambda hidden, weight, **how: linear_cross_entropy(hidden, weight, torch.arange(T), **how)[:1],
            [draw(T, D), draw(32, D)],
        ),
        "para_gru": (para_gru, [draw(1, T, 3, D), draw(3, D) / 4]),
        "para_lstm": (para_lstm, [draw(1, T, 3, D), draw(3, D) / 4, draw(2, D) / 4]),
        "head_rnn": (partial(head_rnn, cell="gru"), [draw(1, T, 3, 1, D), draw(3, 1, D, D) / 4]),
    }


@pytest.mark.parametrize("op", calls())
def test_a_checkpoint_changes_nothing(op):
    call, inputs = calls()[op]

    def run(*tensors):
        out = call(*tensors, backend="triton")
        return sum(y.square().sum() for y in (out if isinstance(out, tuple) else (out,)))

    leaves = [x.requires_grad_() for x in inputs]
    want = torch.autograd.grad(run(*leaves), leaves)
    got = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False), leaves)
    assert all(map(torch.equal, got, want))
