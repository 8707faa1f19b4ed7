"""The Triton kernels of a linear neural memory on real shapes, against the chunked form in float64 on the same card."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from riverrun.kernels.neural_memory.chunked import neural_memory_chunked
from riverrun.kernels.neural_memory.gates import triton_gates
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Rule
from riverrun.kernels.neural_memory.triton_linear_op import linear_memory_triton

RULES = [(online, read, momentum) for online in (True, False) for read in ("after", "before") for momentum in (1, 0)]


def make_inputs(B, T, H=4, K=128, V=128, S=None, momentum=True, chunk=64, dtype=torch.bfloat16):
    """q, k, v, log_keep, lr, log_momentum, initial weights and momentum."""
    like = {"device": "cuda"}
    q, k = (F.normalize(torch.randn(B, T, H, K, **like), dim=-1).to(dtype) for _ in range(2))
    log_keep, log_momentum = -0.1 * torch.rand(2, B, T, H, **like)
    lr = torch.rand(B, T, H, **like) * 0.1 / (1 + (chunk / K) ** 0.5) ** 2
    W, M = torch.randn(2, S or B, H, K, V, **like)
    inputs = [q, k, torch.randn(B, T, H, V, **like).to(dtype), log_keep, lr, log_momentum - 0.1, W, M]
    return inputs if momentum else [*inputs[:5], None, W, None]


def in_chunks(q, k, v, log_keep, lr, log_momentum, W, S, *, chunk, online, read, cu_seqlens):
    state, gates = MemoryState((W,), None if S is None else (S,)), Gates(log_keep, lr, log_momentum)
    rule = Rule(chunk_size=1 if online else chunk, read=read)
    o, final = neural_memory_chunked(q, k, v, state, (gates,), rule, None, None, None, None, cu_seqlens)
    return o, *final.weights, *(final.momentum or ())


def in_triton(q, k, v, log_keep, lr, log_momentum, W, S, *, chunk, online, read, cu_seqlens, keep="root"):
    gates = triton_gates(Gates(log_keep, lr, log_momentum), chunk, cu_seqlens)
    options = {"chunk_size": chunk, "online": online, "read": read, "keep": keep}
    o, *finals = linear_memory_triton(q, k, v, gates, W, S, cu_seqlens, **options)
    return o, *(x for x in finals if x is not None)


def run(form, inputs, dtype=None, chunk=64, online=True, read="after", cu_seqlens=None):
    """The outputs, and the gradients."""
    leaves = [None if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    outputs = form(*leaves, chunk=chunk, online=online, read=read, cu_seqlens=cu_seqlens)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device=x.device).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x for x in leaves if x is not None], upstream)]


def worst(inputs, **options):
    got, want = run(in_triton, inputs, **options), run(in_chunks, inputs, torch.float64, **options)
    return max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("online, read, momentum", RULES)
def test_equals_float64(T, online, read, momentum):
    assert worst(make_inputs(1, T, momentum=momentum), online=online, read=read) < 3e-2


@pytest.mark.parametrize("chunk", [16, 32, 128])
@pytest.mark.parametrize("online", [True, False])
def test_chunk_sizes(chunk, online):
    assert worst(make_inputs(2, 500, chunk=chunk), chunk=chunk, online=online) < 3e-2


@pytest.mark.parametrize("K, V", [(16, 16), (32, 64), (64, 64), (96, 192), (192, 96), (256, 256), (128, 256)])
@pytest.mark.parametrize("online", [True, False])
def test_head_sizes(K, V, online):
    assert worst(make_inputs(2, 500, K=K, V=V), online=online) < 3e-2


@pytest.mark.parametrize(
    "log_keep, log_momentum, lr", [(-20, -0.1, 0.1), (0, -1e-4, 1e-4), (-0.1, -20, 0.1), (0, 0, 0)]
)
@pytest.mark.parametrize("online", [True, False])
def test_extreme_gates(log_keep, log_momentum, lr, online):
    inputs = make_inputs(1, 500)
    for i, value in ((3, log_keep), (4, lr), (5, log_momentum)):
        inputs[i].fill_(value)
    assert worst(inputs, online=online) < 3e-2


def test_repeated_keys():
    inputs = make_inputs(1, 500, momentum=False)
    inputs[1][:, 100:200] = inputs[1][:, 100:101]
    inputs[4].fill_(1.0)
    assert worst(inputs) < 3e-2


@pytest.mark.parametrize("chunk, K", [(64, 128), (128, 256)])
@pytest.mark.parametrize("online, read, momentum", RULES)
def test_single_precision(chunk, K, online, read, momentum):
    inputs = make_inputs(1, 500, K=K, V=K, momentum=momentum, chunk=chunk, dtype=torch.float32)
    assert worst(inputs, chunk=chunk, online=online, read=read) < 1e-4


@pytest.mark.parametrize("online, read, momentum", RULES)
def test_documents(online, read, momentum):
    bounds = torch.tensor([0, 1, 2, 130, 131, 300, 497, 500], dtype=torch.int32, device="cuda")
    inputs = make_inputs(1, 500, S=7, momentum=momentum)
    assert worst(inputs, online=online, read=read, cu_seqlens=bounds) < 3e-2


@pytest.mark.parametrize("chunk, K, V", [(64, 128, 128), (64, 96, 192), (128, 256, 256)])
@pytest.mark.parametrize("online, read, momentum", RULES)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_saved_is_what_is_made_again(chunk, K, V, online, read, momentum, packed):
    """Nearly: walks of other tiles sum in another order."""
    bounds = torch.tensor([0, 1, 2, 130, 131, 300, 497, 500], dtype=torch.int32, device="cuda") if packed else None
    inputs = make_inputs(1, 500, K=K, V=V, S=7 if packed else 1, momentum=momentum, chunk=chunk)
    options = {"chunk": chunk, "online": online, "read": read, "cu_seqlens": bounds}
    again, saved = (run(partial(in_triton, keep=keep), inputs, **options) for keep in ("root", "all"))
    for a, b in zip(again, saved, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=1e-2 * a.abs().max().item())


@pytest.mark.parametrize("online", [True, False])
def test_same_bits_every_time_without_waiting_for_the_device(online):
    inputs = make_inputs(1, 4096, S=3)
    bounds = torch.tensor([0, 100, 3000, 4096], dtype=torch.int32, device="cuda")
    options = {"online": online, "cu_seqlens": bounds}
    first = run(in_triton, inputs, **options)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(in_triton, inputs, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again))
