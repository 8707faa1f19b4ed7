"""The Triton kernels of gates from logits on real shapes, against torch in float64 on the same card; and the writing of
persistent tokens by the online rule."""

import pytest
import torch
from torch.nn import functional as F

from riverrun.kernels.memory_gates import Logits, memory_gates
from riverrun.kernels.neural_memory import Gates, Rule, fresh_state, write_memory


def make(B, T, N, momentum=True, dtype=torch.bfloat16):
    """Slices of one projection, and biases."""
    count = 3 if momentum else 2
    projected = torch.randn(B, T, 3 * N, device="cuda", dtype=dtype) * 3
    return Logits(*projected.split(N, dim=-1)[:count]), Logits(*torch.randn(count, N, device="cuda"))


def run(logits, biases, dtype=None, **options):
    inputs = [[x if x is None else x.detach().to(dtype or x.dtype) for x in part] for part in (logits, biases)]
    leaves = [x.requires_grad_() for part in inputs for x in part if x is not None]
    made = [x for x in memory_gates(*(Logits(*part) for part in inputs), **options) if x is not None]
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in made]
    return made, torch.autograd.grad(made, leaves, upstream)


@pytest.mark.parametrize("scale, shrink", [(1.0, False), (0.3, True), (0.3, False)])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("B, T, N", [(8, 4096, 16), (1, 1, 16), (2, 999, 5), (2, 1000, 48), (1, 500, 100)])
def test_equals_float64(B, T, N, momentum, scale, shrink):
    logits, biases = make(B, T, N, momentum)
    got = run(logits, biases, scale=scale, shrink=shrink)
    want = run(logits, biases, torch.float64, scale=scale, shrink=shrink, backend="chunked")
    for x, y in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=5e-5, atol=1e-7)
    count = len(got[0])
    for i, (x, y) in enumerate(zip(got[1], want[1], strict=True)):
        assert (x - y).norm() <= (4e-3 if i < count else 1e-5) * y.norm()


def test_logarithms_near_zero_are_exact():
    logit = torch.linspace(-60, 60, 2401, device="cuda")
    zeros = torch.zeros(1, device="cuda")
    x = logit[None, :, None]
    log_keep, _, log_momentum = memory_gates(Logits(x, x, -x), Logits(zeros, zeros, zeros))
    for got in (log_keep, log_momentum):
        torch.testing.assert_close(got.flatten().double(), F.logsigmoid(-logit.double()), rtol=1e-5, atol=0)


def test_same_bits_every_time_without_waiting_for_the_device():
    logits, biases = make(4, 4096, 16)
    first = run(logits, biases, shrink=True)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(logits, biases, shrink=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))


def written(inputs, backend, dtype=None):
    k, v, log_keep, lr, log_momentum, W = (
        x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs
    )
    rule, gates = Rule(chunk_size=1), Gates(log_keep, lr, log_momentum)
    fresh = fresh_state((W,), 1, rule, log_momentum is not None, v.shape[-1])
    state = write_memory(k, v, fresh, (gates,), rule=rule, backend=backend)
    made = [*state.weights, *(state.momentum or ())]
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in made]
    return [*made, *torch.autograd.grad(made, [x for x in (k, v, *gates, W) if x is not None], upstream)]


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("T", [2, 4, 17, 128])
def test_online_memories_are_written_by_a_chunk(T, momentum):
    H, K = 16, 128
    k = F.normalize(torch.randn(1, T, H, K, device="cuda"), dim=-1).bfloat16()
    v = torch.randn(1, T, H, K, device="cuda").bfloat16()
    log_keep, log_momentum = -torch.rand(2, 1, T, H, device="cuda") / 4
    inputs = [k, v, log_keep, torch.rand_like(log_keep) / T, log_momentum if momentum else None]
    inputs.append(torch.randn(H, K, K, device="cuda") * K**-0.5)
    for a, b in zip(written(inputs, "auto"), written(inputs, "chunked", torch.float64), strict=True):
        assert (a - b).norm() <= 3e-2 * b.norm()
