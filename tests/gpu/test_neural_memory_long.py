"""Gated memories read at the starts of long chunks on real shapes, against the general chunks in float64 on the same
card."""

import pytest
import torch
from torch.nn.functional import normalize

from riverrun.kernels.neural_memory import Gates, MemoryState, Rule, neural_memory
from riverrun.kernels.neural_memory.chunked import neural_memory_chunked
from riverrun.kernels.neural_memory.long_chunks import neural_memory_long

RULE = Rule(chunk_size=2048, read="chunk", activation="silu", gated=True)


def make_inputs(B, T, H=4, K=512, F=512, V=512, momentum=True, layers=1, b=2048, dtype=torch.bfloat16):
    """q, k, v, the gates of each layer, the weights, and perhaps their momentum; half the largest stable steps."""

    def draw(*shape):
        return torch.randn(*shape, device="cuda")

    tokens = [normalize(draw(B, T, H, K), dim=-1), normalize(draw(B, T, H, K), dim=-1), draw(B, T, H, V)]
    gates = []
    for _ in range(layers):
        log_momentum = -0.1 * draw(B, T, H).exp()
        lr = draw(B, T, H).sigmoid() / b * (-torch.expm1(log_momentum) if momentum else 1)
        gates += [-draw(B, T, H).exp() / 8192, lr, log_momentum][: 2 + momentum]
    sizes = (K, F), (K, F), (F, V)
    states = [scale * draw(B, H, n, m) * n**-0.5 for scale in (1, 0.1)[: 1 + momentum] for n, m in sizes]
    return [x.to(dtype) for x in tokens], gates, states


def run(inputs, rule, of_state, wide):
    """o, the final state, and the gradients; in float64 of the general form."""
    tokens, gates, states = ([x.to(torch.float64 if wide else x.dtype).requires_grad_() for x in xs] for xs in inputs)
    count = 1 + len(states) // 3
    layers = tuple(Gates(*gates[i : i + count]) for i in range(0, len(gates), count))
    state = MemoryState(tuple(states[:3]), tuple(states[3:]) or None, tuple(states[:3]))
    given = *tokens, state, layers * (3 // len(layers)), rule
    if wide:
        o, left = neural_memory_chunked(*given, None, None, None, None, None)
    else:
        o, left = neural_memory_long(*given)
    outputs = [o, *left.weights, *(left.momentum or ())]
    taught = outputs if of_state else outputs[:1]
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in taught]
    grads = torch.autograd.grad(taught, [*tokens, *gates, *states], upstream, allow_unused=True, materialize_grads=True)
    return [*outputs, *grads]


def worst(inputs, rule=RULE, of_state=True):
    want, got = (run(inputs, rule, of_state, wide) for wide in (True, False))
    return max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("of_state", [True, False])
@pytest.mark.parametrize("T", [2, 1000, 4096, 5000])
def test_equals_float64(T, of_state):
    assert worst(make_inputs(2, T), of_state=of_state) < 2e-2


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("bias", ["l2", "dot"])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_networks(activation, bias, momentum, layers):
    rule = Rule(chunk_size=256, read="chunk", activation=activation, bias=bias, gated=True)
    inputs = make_inputs(2, 700, K=128, F=256, V=128, momentum=momentum, layers=layers, b=256)
    assert worst(inputs, rule) < 2e-2


@pytest.mark.parametrize("K, F, V", [(64, 128, 64), (96, 100, 40), (128, 640, 128)])
def test_sizes_and_single_precision(K, F, V):
    rule = Rule(chunk_size=1024, read="chunk", activation="silu", gated=True)
    inputs = make_inputs(2, 2500, H=3, K=K, F=F, V=V, b=1024, dtype=torch.float32)
    assert worst(inputs, rule) < 1e-4


def test_same_bits_every_time_without_waiting_for_the_device():
    inputs = make_inputs(2, 5000)
    first = run(inputs, RULE, True, False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(inputs, RULE, True, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_the_op_takes_it_of_its_own_accord(monkeypatch):
    import riverrun.kernels.neural_memory.triton_path as path

    taken = []

    def note(*arguments):
        taken.append(1)
        return neural_memory_long(*arguments)

    monkeypatch.setattr(path, "neural_memory_long", note)
    (q, k, v), gates, states = make_inputs(1, 4096)
    neural_memory(q, k, v, tuple(w[0] for w in states[:3]), Gates(*gates), rule=RULE)
    assert taken


def test_memory():
    """For the way back are kept 8 numbers of a layer's width a token: keys, queries, a and c of both, e and ∂h."""
    B, T, H, F = 4, 8192, 4, 512
    inputs = make_inputs(B, T)
    run(inputs, RULE, False, False)
    tokens, gates, states = ([x.requires_grad_() for x in xs] for xs in inputs)
    state = MemoryState(tuple(states[:3]), tuple(states[3:]), tuple(states[:3]))
    before = torch.cuda.memory_allocated()
    made = neural_memory_long(*tokens, state, (Gates(*gates),) * 3, RULE)
    of_tokens, of_state = 2 * B * T * H * F, 4 * B * H * 6 * F * F
    chunks = T // RULE.chunk_size
    # and o; the first state, those between chunks and the last, and what products take of the weights at each
    assert torch.cuda.memory_allocated() - before < 1.05 * (9 * of_tokens + (chunks + 1 + chunks / 4) * of_state)
    del made
