"""Every op on the GPU, at the shapes of a 130M to 1B model, against the same op in float64 on the CPU."""

import pytest
import torch

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.kernels.gated_delta import gated_delta
from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.kernels.linear_cross_entropy import linear_cross_entropy
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm
from riverrun.kernels.ssd import ssd

T = 777
DOCUMENTS = [0, 1, 2, 130, 131, 500, T]


def unit(*shape):
    return torch.randn(*shape)


def case(op):
    """The op as a function of its tensors, and inputs in fp32."""
    if op == "ssd":
        inputs = [unit(1, T, 8, 64), torch.rand(1, T, 8) * 0.1 + 1e-3, -torch.rand(8) * 15 - 1]
        inputs += [unit(1, T, 2, 128) / 8, unit(1, T, 2, 128) / 8, torch.ones(8)]
        return lambda *a, **k: ssd(*a, **k), inputs
    if op == "gated_delta":
        inputs = [unit(1, T, 4, 96), unit(1, T, 2, 4, 96), unit(1, T, 2, 4, 192), torch.rand(1, T, 2, 4) * 2]
        inputs += [-torch.rand(1, T, 4)]
        return lambda *a, **k: gated_delta(*a, qk_l2norm=True, **k), inputs
    if op == "para_gru":
        return lambda *a, **k: para_gru(*a, **k), [unit(1, T, 3, 512), unit(3, 512).clamp(-0.5, 0.5)]
    if op == "para_lstm":
        inputs = [unit(1, T, 3, 512), unit(3, 512).clamp(-0.5, 0.5), unit(2, 512).clamp(-0.5, 0.5)]
        return lambda *a, **k: para_lstm(*a, **k), inputs
    if op == "causal_conv1d":
        return lambda *a, **k: causal_conv1d(*a, activation="silu", **k), [unit(1, T, 512), unit(512, 4), unit(512)]
    raise AssertionError(op)


def run(function, inputs, upstream, **kwargs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y, state = function(*inputs, **kwargs)
    loss = (y * upstream.to(y)).sum() + state.sum()
    return [y, state, *torch.autograd.grad(loss, inputs)]


def relative(a, b):
    return ((a.double().cpu() - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", ["ssd", "gated_delta", "para_gru", "para_lstm", "causal_conv1d"])
def test_op_agrees_with_float64(op, packed):
    function, inputs = case(op)
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32) if packed else None
    with torch.no_grad():
        upstream = torch.randn_like(function(*inputs)[0])
    expected = run(function, [x.double() for x in inputs], upstream.double(), cu_seqlens=cu_seqlens)
    on_gpu = {"cu_seqlens": cu_seqlens.cuda() if packed else None}
    for got, want in zip(run(function, [x.cuda() for x in inputs], upstream.cuda(), **on_gpu), expected):
        assert relative(got, want) < 1e-4
    # bf16 inputs (parameters stay fp32, as the mixers hold them): the same function of the rounded inputs
    rounded = [x.bfloat16() if x.dim() > 2 else x for x in inputs]
    expected = run(function, [x.double() for x in rounded], upstream.double(), cu_seqlens=cu_seqlens)
    for got, want in zip(run(function, [x.cuda() for x in rounded], upstream.cuda(), **on_gpu), expected):
        assert relative(got, want) < 3e-2


@pytest.mark.parametrize("op", ["ssd", "gated_delta", "para_gru", "para_lstm", "causal_conv1d"])
def test_op_gives_the_same_bits_every_time(op):
    function, inputs = case(op)
    inputs = [x.cuda().bfloat16() if x.dim() > 2 else x.cuda() for x in inputs]
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32, device="cuda")
    with torch.no_grad():
        upstream = torch.randn_like(function(*inputs)[0])
    first = run(function, inputs, upstream, cu_seqlens=cu_seqlens)
    for _ in range(3):
        for got, want in zip(run(function, inputs, upstream, cu_seqlens=cu_seqlens), first):
            assert torch.equal(got, want)


def test_gated_rms_norm_and_cross_entropy_agree_with_float64():
    x, gate, weight = unit(300, 1024), unit(300, 1024), unit(1024)
    for before in (False, True):
        want = gated_rms_norm(x.double(), gate.double(), weight.double(), groups=4, norm_before_gate=before)
        got = gated_rms_norm(x.cuda(), gate.cuda(), weight.cuda(), groups=4, norm_before_gate=before)
        assert relative(got, want) < 1e-5
    hidden, head, targets = unit(500, 256), unit(32_000, 256) / 16, torch.randint(0, 32_000, (500,))
    targets[::7] = -100
    results = []
    for h, w, t in [(hidden.double(), head.double(), targets), (hidden.cuda(), head.cuda(), targets.cuda())]:
        h, w = h.requires_grad_(), w.requires_grad_()
        out = linear_cross_entropy(h, w, t, z_loss=1e-4)
        total = out.loss + out.z_loss
        results.append([total, *torch.autograd.grad(total, [h, w])])
    for want, got in zip(*results):
        assert relative(got, want) < 1e-5
