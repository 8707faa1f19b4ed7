"""The Triton kernels of ssd on real shapes, against the step loop in float64 on the same card."""

import functools

import pytest
import torch

from riverrun.kernels.ssd.chunked import ssd_chunked
from riverrun.kernels.ssd.reference import ssd_reference
from riverrun.kernels.ssd.triton_op import ssd_triton


def make_inputs(B, T, H=8, G=1, P=64, N=128, D="H", S=None, dt_scale=0.05, decay=1.0, dtype=torch.bfloat16):
    """x, dt, A, B, C, D, initial_state."""
    like = {"device": "cuda"}
    x, b, c = torch.randn(B, T, H, P, **like), torch.randn(B, T, G, N, **like), torch.randn(B, T, G, N, **like)
    dt, A = torch.randn(B, T, H, **like).exp() * dt_scale, -decay * torch.randn(H, **like).exp()
    skip = {None: None, "H": torch.randn(H, **like), "HP": torch.randn(H, P, **like)}[D]
    return [x.to(dtype), dt, A, b.to(dtype), c.to(dtype), skip, torch.randn(S or B, H, P, N, **like)]


def run(function, inputs, dtype=None, cu_seqlens=None):
    """y, final state, and the gradients."""
    leaves = [None if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in inputs]
    outputs = function(*leaves, cu_seqlens)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, device="cuda").to(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], upstream)]


def worst(inputs, cu_seqlens=None, exact=ssd_reference):
    want = run(exact, inputs, torch.float64, cu_seqlens)
    got = run(ssd_triton, inputs, None, cu_seqlens)
    return max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("G", [1, 2])
def test_equals_float64(T, G):
    assert worst(make_inputs(1, T, G=G)) < 2e-2


@pytest.mark.parametrize("P, N", [(64, 64), (128, 128), (32, 16), (64, 256), (128, 256), (96, 80)])
@pytest.mark.parametrize("D", [None, "H", "HP"])
def test_head_sizes(P, N, D):
    assert worst(make_inputs(2, 200, P=P, N=N, D=D)) < 2e-2


def test_programs_of_whole_heads_and_groups():
    chunked = functools.partial(ssd_chunked, chunk_size=64)  # the step loop would take all of the memory
    assert worst(make_inputs(8, 1100, H=32), exact=chunked) < 2e-2


@pytest.mark.parametrize("dt_scale, decay", [(30.0, 1.0), (0.05, 1e-6), (1e-3, 1.0), (0.05, 1e3)])
def test_decay_from_hardly_any_to_all(dt_scale, decay):
    assert worst(make_inputs(1, 500, dt_scale=dt_scale, decay=decay)) < 2e-2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_other_types(dtype, tolerance):
    assert worst(make_inputs(1, 500, G=2, dtype=dtype)) < tolerance


def test_documents():
    bounds = torch.tensor([0, 1, 2, 130, 131, 300, 497, 500], dtype=torch.int32, device="cuda")
    assert worst(make_inputs(1, 500, G=2, S=7), bounds) < 2e-2


def test_more_walks_than_a_side_of_a_grid_may_have():
    """2,000 documents of one token are as many rows of one token."""
    inputs = make_inputs(1, 2000, H=64, P=16, N=16, S=2000)
    rows = [t.transpose(0, 1) if t is not None and t.shape[:2] == (1, 2000) else t for t in inputs]
    packed = run(ssd_triton, inputs, None, torch.arange(2001, dtype=torch.int32, device="cuda"))
    want = run(ssd_reference, rows, torch.float64)
    assert max(((a.flatten() - b.flatten()).norm() / b.norm()).item() for a, b in zip(packed[:2], want[:2])) < 2e-2


def test_same_bits_every_time_without_waiting_for_the_device():
    inputs = make_inputs(1, 4096, S=3)
    bounds = torch.tensor([0, 100, 3000, 4096], dtype=torch.int32, device="cuda")
    first = run(ssd_triton, inputs, None, bounds)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(ssd_triton, inputs, None, bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again))
