"""Sequences cut into shards, whose states and adjoints are handed on as ranks do it, against the whole in one piece."""

import pytest
import torch

from riverrun.kernels.gated_delta import gated_delta, triton_launch
from riverrun.kernels.gated_delta.triton_carried import CarriedGatedDelta
from riverrun.kernels.ssd import ssd
from riverrun.kernels.ssd.triton_carried import CarriedSSD

T, SHARDS, H = 36, 3, 2


def shard(tensors, tokens, s):
    size = T // SHARDS
    part = [None if t is None else t[:, s * size : (s + 1) * size].contiguous() for t in tensors[:tokens]]
    return (*part, *tensors[tokens:])


def in_shards(recurrence, tensors, tokens, upstream):
    """The outputs, and the gradients of the inputs: of shards one after the other."""
    parts = [shard(tensors, tokens, s) for s in range(SHARDS)]
    states, transfers = [], []
    for part in parts:
        transfer, added = recurrence.summary(part, None, True)
        before = torch.zeros_like(added) if not states else states[-1]
        states.append(recurrence.apply(transfer, before) + added)
        transfers.append(transfer)
    starts = [torch.zeros_like(states[0]), *states[:-1]]
    outputs = [recurrence.run(part, start, None) for part, start in zip(parts, starts)]

    after, grads = torch.zeros_like(states[0]), []
    for s in reversed(range(SHARDS)):
        (grad,) = shard([upstream], 1, s)
        grads.insert(0, recurrence.gradients(grad, after, parts[s], starts[s], None))
        after = recurrence.apply_adjoint(transfers[s], after) + recurrence.adjoint(grad, parts[s], None)
    joined = []
    for number, of in enumerate(zip(*grads)):
        if of[0] is not None:
            joined.append(torch.cat(of, 1) if number < tokens else torch.stack(of).sum(0))
    return [torch.cat(outputs, 1), *joined]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.linalg.vector_norm(a.double() - b) < 2e-5 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("with_skip", [False, True])
def test_ssd(with_skip):
    G, P, N = 1, 8, 16
    tensors = [torch.randn(2, T, H, P), torch.randn(2, T, H) - 1, torch.randn(2, T, G, N), torch.randn(2, T, G, N)]
    shared = [-torch.randn(H).exp() / 4, torch.randn(H) if with_skip else None, torch.randn(H)]
    upstream = torch.randn(2, T, H, P)
    leaves = [None if t is None else t.double().requires_grad_() for t in (*tensors, *shared)]
    x, dt, B, C, A, D, bias = leaves
    y, _ = ssd(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, backend="reference")
    want = [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], upstream.double())]
    assert_equal(in_shards(CarriedSSD(softplus=True), (*tensors, *shared), 4, upstream), want)


@pytest.mark.parametrize(("n", "gated"), [(1, True), (2, False)])
def test_gated_delta(n, gated, monkeypatch):
    monkeypatch.setattr(triton_launch, "HOPPER", triton_launch.Tiles(16, 64))
    K, V, scale = 16, 24, 0.3
    tensors = [
        torch.randn(1, T, H, K), torch.randn(1, T, n, H, K), torch.randn(1, T, n, H, V),
        2 * torch.rand(1, T, n, H), -0.3 * torch.rand(1, T, H) if gated else None,
    ]  # fmt: skip
    upstream = torch.randn(1, T, H, V)
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    o, _ = gated_delta(*leaves, scale, qk_l2norm=True, backend="reference")
    want = [o, *torch.autograd.grad(o, [t for t in leaves if t is not None], upstream.double())]
    assert_equal(in_shards(CarriedGatedDelta(scale, exact=True), tuple(tensors), 5, upstream), want)
