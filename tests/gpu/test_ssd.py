"""The Triton kernels of ssd on real shapes, against the step loop in float64 on the same card."""

import functools
import math

import pytest
import torch

from riverrun.kernels.ssd import ssd
from riverrun.kernels.ssd.triton_launch import Launch


def make_inputs(B, T, H=8, G=1, P=64, N=128, D="H", S=None, step=0.05, decay=1.0, dtype=torch.bfloat16):
    """x, dt, A, B, C, D, dt_bias, initial_state; dt is as a projection leaves it, `step` what softplus makes of it."""
    draw = functools.partial(torch.randn, device="cuda")
    x, dt, b, c = (draw(B, T, *size).to(dtype) for size in ((H, P), (H,), (G, N), (G, N)))
    A, bias = -decay * draw(H).exp(), 0.1 * draw(H) + step + math.log(-math.expm1(-step))
    skip = {None: None, "H": draw(H), "HP": draw(H, P)}[D]
    return [x, dt, A, b, c, skip, bias, draw(S or B, H, P, N)]


def run(backend, inputs, dtype=None, cu_seqlens=None):
    """y, final state, and the gradients."""
    leaves = [None if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in inputs]
    *tensors, bias, state = leaves
    steps = {"dt_bias": bias, "dt_softplus": bias is not None}
    outputs = ssd(*tensors, **steps, initial_state=state, cu_seqlens=cu_seqlens, backend=backend)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, device="cuda").to(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], upstream)]


def worst(inputs, cu_seqlens=None, exact="reference"):
    want = run(exact, inputs, torch.float64, cu_seqlens)
    got = run("triton", inputs, None, cu_seqlens)
    return max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want))


def segments(inputs, cu_seqlens=None):
    return Launch.of(inputs[0], inputs[3], cu_seqlens).segments


def bounds_of(*bounds):
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000, 4096])
def test_equals_float64(T):
    assert worst(make_inputs(1, T)) < 2e-2


def test_a_long_row_in_segments():
    inputs = make_inputs(1, 65536, H=4)
    assert segments(inputs) is not None
    assert worst(inputs, exact="chunked") < 2e-2


def test_documents_across_segments():
    bounds = bounds_of(0, 1, 2, 2500, 2501, 6000)
    inputs = make_inputs(1, 6000, S=5)
    assert segments(inputs, bounds).inner_end.sum() >= 4
    assert worst(inputs, bounds, exact="chunked") < 2e-2


def test_strong_decay_in_segments():
    assert worst(make_inputs(1, 4096, decay=100.0), exact="chunked") < 2e-2


@pytest.mark.parametrize(
    "P, N, D",
    [
        (64, 64, None),
        (128, 128, "H"),
        (64, 256, "H"),
        (128, 256, None),
        (96, 80, "HP"),
        (32, 16, "HP"),
        (32, 128, "H"),
        (64, 16, None),
        (16, 16, "H"),
        (8, 200, None),
    ],
)
def test_head_sizes(P, N, D):
    assert worst(make_inputs(2, 200, P=P, N=N, D=D)) < 2e-2


def test_programs_of_whole_heads_and_groups():
    """And so no segments. The step loop would take all of the memory."""
    inputs = make_inputs(8, 1100, H=32)
    assert segments(inputs) is None
    assert worst(inputs, exact="chunked") < 2e-2


@pytest.mark.parametrize("step, decay", [(30.0, 1.0), (0.05, 1e-6), (1e-3, 1.0), (0.05, 1e3)])
def test_decay_from_hardly_any_to_all(step, decay):
    assert worst(make_inputs(1, 500, step=step, decay=decay)) < 2e-2


def test_steps_made_before():
    x, dt, *rest, bias, state = make_inputs(1, 500)
    assert worst([x, torch.nn.functional.softplus(dt + bias), *rest, None, state]) < 2e-2


def test_softplus_from_next_to_nothing_to_its_argument():
    """To a relative 1e-5: the final state of one token is Δ x B, and Δ' = σ."""
    raw = torch.cat([torch.linspace(-60, 60, 241), torch.tensor([-1e4, 1e4])]).cuda()
    dt, H = raw.view(1, 1, -1).requires_grad_(), len(raw)
    one = torch.ones(1, 1, 1, 1, device="cuda")
    _, state = ssd(one.expand(1, 1, H, 1), dt, -one.new_ones(H), one, one, dt_softplus=True, backend="triton")
    (slope,) = torch.autograd.grad(state.sum(), dt)
    exact = raw.detach().double()
    torch.testing.assert_close(state.flatten().double(), torch.logaddexp(exact, 0 * exact), rtol=1e-5, atol=1e-37)
    torch.testing.assert_close(slope.flatten().double(), exact.sigmoid(), rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-5), (torch.float16, 5e-3)])
def test_other_types(dtype, tolerance):
    assert worst(make_inputs(1, 500, G=2, dtype=dtype)) < tolerance


def test_documents():
    assert worst(make_inputs(1, 500, G=2, S=7), bounds_of(0, 1, 2, 130, 131, 300, 497, 500)) < 2e-2


def test_more_walks_than_a_side_of_a_grid_may_have():
    """2,000 documents of one token are as many rows of one token, as in decoding."""
    inputs = make_inputs(1, 2000, H=64, P=16, N=16, S=2000)
    rows = [t.transpose(0, 1) if t is not None and t.shape[:2] == (1, 2000) else t for t in inputs]
    want = run("reference", rows, torch.float64)
    packed = run("triton", inputs, None, torch.arange(2001, dtype=torch.int32, device="cuda"))
    for got in (packed, run("triton", rows)):
        assert max(((a.flatten() - b.flatten()).norm() / b.norm()).item() for a, b in zip(got[:2], want[:2])) < 2e-2


@pytest.mark.parametrize("bounds", [(0, 100, 3000, 4096), (0, 500)])
def test_same_bits_every_time_without_waiting_for_the_device(bounds):
    """In segments, and not."""
    inputs, bounds = make_inputs(1, bounds[-1], S=len(bounds) - 1), bounds_of(*bounds)
    first = run("triton", inputs, None, bounds)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run("triton", inputs, None, bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again))
