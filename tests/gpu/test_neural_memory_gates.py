"""The Triton kernels of a memory's gates on real shapes, against torch in float64 on the same card."""

import pytest
import torch

from riverrun.kernels.neural_memory.gates import triton_gates
from riverrun.kernels.neural_memory.rule import Gates
from riverrun.kernels.neural_memory.triton_gates import chunk_gates_triton

BOUNDS = [0, 1, 18, 82, 83, 210, 1000]


def make_gates(B, T, H=16, momentum=True):
    log_keep, log_momentum = -torch.rand(2, B, T, H, device="cuda") / 4
    return Gates(log_keep, torch.rand_like(log_keep), log_momentum if momentum else None)


def bounds_of(bounds):
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


def run(form, gates, chunk_size, cu_seqlens=None, dtype=torch.float32):
    """What there is of ChunkGates, and the gradients of all gates through all of it."""
    gates = gates.each(lambda x: x.to(dtype).detach().requires_grad_())
    outputs = [x for x in form(gates, chunk_size, cu_seqlens) if x is not None]
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in outputs]
    return outputs, torch.autograd.grad(outputs, [x for x in gates if x is not None], upstream)


def assert_equal(gates, chunk_size, cu_seqlens=None):
    """Entries to their own last digits, but for those below the least normal number, which are rounded to 0."""
    got, grads = run(chunk_gates_triton, gates, chunk_size, cu_seqlens)
    want, want_grads = run(triton_gates, gates, chunk_size, cu_seqlens, torch.float64)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=5e-5, atol=1e-36)
    for x, y in zip(grads, want_grads, strict=True):
        assert x.isfinite().all() and (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
@pytest.mark.parametrize("B, T, H", [(2, 1024, 16), (1, 1, 4), (3, 1000, 6), (1, 500, 1)])
def test_equals_float64(B, T, H, chunk_size, momentum):
    assert_equal(make_gates(B, T, H, momentum), chunk_size)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_documents(chunk_size, momentum):
    assert_equal(make_gates(1, BOUNDS[-1], 6, momentum), chunk_size, bounds_of(BOUNDS))


@pytest.mark.parametrize("name", ["log_keep", "log_momentum"])
@pytest.mark.parametrize("value", [-40.0, -20.0, -1e-6, 0.0, -torch.inf])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("chunk_size", [64, 128])
def test_extreme_gates(name, value, every, chunk_size):
    gates = make_gates(1, 500)
    gates.log_keep[:, ::2] = -1e-4
    gates.log_momentum[:, 1::2] = -1e-4
    getattr(gates, name)[:, ::every] = value
    for some in (gates, gates._replace(log_momentum=None)):
        assert_equal(some, chunk_size)


@pytest.mark.parametrize("packed", [True, False])
def test_same_bits_every_time_without_waiting_for_the_device(packed):
    gates, bounds = make_gates(1, BOUNDS[-1]), bounds_of(BOUNDS) if packed else None
    first = run(chunk_gates_triton, gates, 64, bounds)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(chunk_gates_triton, gates, 64, bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))


def test_memory_is_what_is_made():
    """Nothing of a matrix's size is kept beside it."""
    gates = make_gates(2, 4096).each(torch.Tensor.requires_grad_)
    made = chunk_gates_triton(gates, 64, None)  # checks itself
    size = made.weight.nbytes
    del made
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = chunk_gates_triton(gates, 64, None)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * size
    sum(x.sum() for x in made).backward()
    assert all(x.grad is not None for x in gates)
