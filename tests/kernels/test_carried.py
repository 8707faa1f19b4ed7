"""Sequences cut into shards, whose states and adjoints are handed on as ranks do it, against the whole in one piece."""

import pytest
import torch

from riverrun.kernels.common import triton_segments
from riverrun.kernels.gated_delta import gated_delta
from riverrun.kernels.gated_delta import triton_launch as delta_launch
from riverrun.kernels.gated_delta.triton_carried import CarriedGatedDelta
from riverrun.kernels.ssd import ssd
from riverrun.kernels.ssd import triton_launch as ssd_launch
from riverrun.kernels.ssd.triton_carried import CarriedSSD

SHARDS, H = 3, 2


WHOLE, SEGMENTS = 12, 66  # tokens of a shard that is walked in one piece, and in several


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(triton_segments, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(ssd_launch, "CHUNK", 32)  # of which float32 takes half
    monkeypatch.setattr(delta_launch, "HOPPER", delta_launch.Tiles(16, 64))


def shard(tensors, tokens, s):
    size = tensors[0].shape[1] // SHARDS
    part = [None if t is None else t[:, s * size : (s + 1) * size].contiguous() for t in tensors[:tokens]]
    return (*part, *tensors[tokens:])


def in_shards(recurrence, tensors, tokens, upstream):
    """The outputs, and the gradients of the inputs: of shards one after the other."""
    parts = [shard(tensors, tokens, s) for s in range(SHARDS)]
    transfers = [recurrence.transfer(part, None) for part in parts]
    starts, outputs, leaving = [], [], None
    for part, transfer in zip(parts, transfers):

        def enter(added, transfer=transfer):
            nonlocal leaving
            starts.append(torch.zeros_like(added) if leaving is None else leaving)
            leaving = recurrence.apply(transfer, starts[-1]) + added
            return starts[-1]

        outputs.append(recurrence.run(part, None, enter))

    grads, entering = [], None
    for s in reversed(range(SHARDS)):

        def leave(adjoint, transfer=transfers[s]):
            nonlocal entering
            after = torch.zeros_like(adjoint) if entering is None else entering
            entering = recurrence.apply_adjoint(transfer, after) + adjoint
            return after

        (grad,) = shard([upstream], 1, s)
        grads.insert(0, recurrence.gradients(grad, parts[s], starts[s], None, leave))
    joined = []
    for number, of in enumerate(zip(*grads)):
        if of[0] is not None:
            joined.append(torch.cat(of, 1) if number < tokens else torch.stack(of).sum(0))
    return [torch.cat(outputs, 1), *joined]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.linalg.vector_norm(a.double() - b) < 2e-5 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize(("size", "with_skip"), [(WHOLE, False), (SEGMENTS, True)])
def test_ssd(size, with_skip):
    B, T, G, P, N = 2, size * SHARDS, 1, 8, 16
    tensors = [torch.randn(B, T, H, P), torch.randn(B, T, H) - 1, torch.randn(B, T, G, N), torch.randn(B, T, G, N)]
    launch = ssd_launch.Launch.of(tensors[0][:, :size], tensors[2][:, :size], None)
    assert (launch.segments is not None) == (size == SEGMENTS)
    shared = [-torch.randn(H).exp() / 4, torch.randn(H) if with_skip else None, torch.randn(H)]
    upstream = torch.randn(B, T, H, P)
    leaves = [None if t is None else t.double().requires_grad_() for t in (*tensors, *shared)]
    x, dt, b, c, A, D, bias = leaves
    y, _ = ssd(x, dt, A, b, c, D, dt_bias=bias, dt_softplus=True, backend="reference")
    want = [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], upstream.double())]
    assert_equal(in_shards(CarriedSSD(softplus=True), (*tensors, *shared), 4, upstream), want)


@pytest.mark.parametrize(("size", "n", "gated"), [(WHOLE, 1, True), (WHOLE, 2, False), (SEGMENTS, 1, True)])
def test_gated_delta(size, n, gated):
    T, K, V, scale = size * SHARDS, 16, 24, 0.3
    tensors = [
        torch.randn(1, T, H, K), torch.randn(1, T, n, H, K), torch.randn(1, T, n, H, V),
        2 * torch.rand(1, T, n, H), -0.3 * torch.rand(1, T, H) if gated else None,
    ]  # fmt: skip
    launch = delta_launch.Launch.of(tensors[1][:, :size], tensors[2][:, :size], None, True)
    assert (launch.segments is not None) == (size == SEGMENTS)
    upstream = torch.randn(1, T, H, V)
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    o, _ = gated_delta(*leaves, scale, qk_l2norm=True, backend="reference")
    want = [o, *torch.autograd.grad(o, [t for t in leaves if t is not None], upstream.double())]
    assert_equal(in_shards(CarriedGatedDelta(scale, exact=True), tuple(tensors), 5, upstream), want)
