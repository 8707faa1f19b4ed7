"""The Triton kernels of the two-layer neural memory on real shapes, against the chunked form in float64 on the same
card."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from riverrun.kernels.neural_memory.chunked import neural_memory_chunked
from riverrun.kernels.neural_memory.gates import triton_gates
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Rule
from riverrun.kernels.neural_memory.triton_mlp import mlp_memory_triton


def make_inputs(B, T, H=4, K=128, F=512, V=128, S=None, momentum=True, norm=True, dtype=torch.bfloat16):
    """q, k, v, log_keep, lr and perhaps log_momentum, W₁, W₂ and perhaps S₁, S₂, perhaps the norm's gain."""

    def draw(*shape):
        return torch.randn(*shape, device="cuda")

    tokens = [normalize(draw(B, T, H, K), dim=-1), normalize(draw(B, T, H, K), dim=-1), draw(B, T, H, V)]
    log_momentum = -draw(B, T, H).exp()
    # small steps: with 16 times as large ones float32's rounding errors grow to the outputs' size in 2,000 tokens
    lr = draw(B, T, H).sigmoid() / (16 * F) * (-torch.expm1(log_momentum) if momentum else 1)
    gates = [-0.01 * draw(B, T, H).abs(), lr, log_momentum][: 2 + momentum]
    weights = [draw(S or B, H, K, F), draw(S or B, H, F, V) * F**-0.5]
    weights += [0.1 * draw(*x.shape) * x.std() for x in weights] * momentum
    return [*(x.to(dtype) for x in tokens), *gates, *weights, *[1 + 0.1 * draw(H, V)] * norm]


def run(inputs, rule, momentum, norm, cu_seqlens=None, dtype=None, keep="root", max_seqlen=None):
    """o, the final state, and the gradients; in float64 of the chunked form."""
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    q, k, v, *rest = leaves
    gates, rest = Gates(*rest[: 2 + momentum]), rest[2 + momentum :]
    weights, still, gain = tuple(rest[:2]), tuple(rest[2:4]) if momentum else None, rest[-1] if norm else None
    if dtype is None:
        of_chunks = triton_gates(gates, rule.chunk_size, cu_seqlens)
        o, weights, still = mlp_memory_triton(
            q, k, v, (of_chunks, of_chunks), gain, weights, still, cu_seqlens, chunk_size=rule.chunk_size,
            activation=rule.activation, residual=rule.residual, read=rule.read, keep=keep,
            max_seqlen=max_seqlen,
        )  # fmt: skip
    else:
        state = MemoryState(weights, still, weights)
        o, final = neural_memory_chunked(q, k, v, state, (gates, gates), rule, gain, None, None, None, cu_seqlens)
        weights, still = final.weights, final.momentum
    outputs = (o, *weights, *(still or ()))
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def worst(inputs, momentum=True, norm=True, cu_seqlens=None, keep="root", **options):
    rule = Rule(**{"chunk_size": 64, "residual": True} | options)
    want = run(inputs, rule, momentum, norm, cu_seqlens, torch.float64)
    longest = None if cu_seqlens is None else int(cu_seqlens.diff().max())
    got = run(inputs, rule, momentum, norm, cu_seqlens, keep=keep, max_seqlen=longest)
    return max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("T", [1, 63, 65, 1000, 4096])
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_equals_float64(T, chunk_size):
    assert worst(make_inputs(1, T), chunk_size=chunk_size) < 3e-2


@pytest.mark.parametrize("momentum, bounds", [(True, None), (False, [0, 1, 130, 600, 1000])])
def test_the_states_of_all_chunks(momentum, bounds):
    """Kept instead of made again."""
    inputs = make_inputs(2 if bounds is None else 1, 1000, S=bounds and len(bounds) - 1, momentum=momentum)
    cu_seqlens = bounds and torch.tensor(bounds, dtype=torch.int32, device="cuda")
    assert worst(inputs, momentum, cu_seqlens=cu_seqlens, keep="all") < 3e-2


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_networks(activation, momentum, norm):
    inputs = make_inputs(2, 300, momentum=momentum, norm=norm)
    assert worst(inputs, momentum, norm, activation=activation, residual=norm) < 3e-2
    assert worst(inputs, momentum, norm, read="before") < 3e-2


@pytest.mark.parametrize("K, F, V", [(64, 128, 64), (64, 256, 64), (96, 384, 128), (128, 1024, 96)])
def test_sizes(K, F, V):
    assert worst(make_inputs(2, 300, K=K, F=F, V=V), residual=False) < 3e-2


@pytest.mark.parametrize("K, chunk_size", [(128, 64), (64, 16)])
def test_single_precision(K, chunk_size):
    assert worst(make_inputs(1, 500, K=K, V=K, dtype=torch.float32), chunk_size=chunk_size) < 1e-4


@pytest.mark.parametrize("momentum, chunk_size", [(True, 64), (True, 16), (False, 64), (False, 32), (False, 16)])
def test_documents(momentum, chunk_size):
    bounds = torch.tensor([0, 1, 2, 130, 131, 300, 900, 1000], dtype=torch.int32, device="cuda")
    inputs = make_inputs(1, 1000, S=7, momentum=momentum)
    assert worst(inputs, momentum, cu_seqlens=bounds, chunk_size=chunk_size) < 3e-2


@pytest.mark.parametrize("K, alike, half_life", [(64, 2.0, 8192), (96, 2.0, 8192), (128, 1.0, 8192), (96, 2.0, 256)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
def test_long_sequences_of_keys_that_are_alike(K, alike, half_life, dtype, tolerance):
    """As models have them, which magnified rounding without bound before norms had their ε."""
    T, H, F = 4096, 4, 4 * K
    common = alike * torch.randn(H, K, device="cuda")
    q, k, v = (normalize(torch.randn(1, T, H, K, device="cuda") + common, dim=-1).to(dtype) for _ in range(3))
    keep = torch.full((1, T, H), -math.log(2) / half_life, device="cuda")
    log_momentum = torch.nn.functional.logsigmoid(2.2 + 0.5 * torch.randn(1, T, H, device="cuda"))
    lr = torch.rand(1, T, H, device="cuda") * 2 * -torch.expm1(log_momentum) / (64 * 2.2)
    weights = [torch.randn(1, H, K, F, device="cuda") * K**-0.5, torch.randn(1, H, F, K, device="cuda") * F**-0.5]
    gain = torch.full((H, K), K**-0.5, device="cuda")
    inputs = [q, k, v, keep, lr, log_momentum, *weights, *map(torch.zeros_like, weights), gain]
    assert worst(inputs) < tolerance


def test_same_bits_every_time_without_waiting_for_the_device():
    inputs, rule = make_inputs(1, 4096, S=3), Rule(chunk_size=64, residual=True)
    bounds = torch.tensor([0, 100, 3000, 4096], dtype=torch.int32, device="cuda")
    first = run(inputs, rule, True, True, bounds)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(inputs, rule, True, True, bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again))
