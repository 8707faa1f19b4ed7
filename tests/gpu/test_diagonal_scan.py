"""The Triton kernels of diagonal_scan on real shapes, against the step loop in float64 on the same card."""

import pytest
import torch

from riverrun.kernels.diagonal_scan import diagonal_scan
from riverrun.kernels.diagonal_scan.triton_op import Launch

SINGLE = [torch.float32, torch.complex64]
both_numbers = pytest.mark.parametrize("dtype", SINGLE)
both_decays = pytest.mark.parametrize("constant", [False, True])


def make_inputs(B, T, D, S=None, dtype=torch.float32, constant=False):
    """x, a, initial_state; memories of 1 to 10 000 tokens."""
    wide = torch.complex64 if dtype.is_complex else torch.float32
    shape = (D,) if constant else (B, T, D)
    memory = 10 ** (4 * torch.rand(shape[-1:], device="cuda"))
    turn = torch.randn(shape, device="cuda", dtype=wide).sgn()
    a = turn * torch.exp(-torch.rand(shape, device="cuda") / memory)
    inputs = [torch.randn(B, T, D, device="cuda", dtype=wide), a]
    return [*(t.to(dtype) for t in inputs), torch.randn(S or B, D, device="cuda", dtype=wide)]


def run(inputs, **options):
    x, a, state = leaves = [t.detach().clone().requires_grad_() for t in inputs]
    h, final = diagonal_scan(x, a, initial_state=state, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(*t.shape, 2, generator=generator, device="cuda").bfloat16().float() for t in (h, final)]
    upstream = [torch.view_as_complex(g) if x.is_complex() else g[..., 0] for g in upstream]
    return [h, final, *torch.autograd.grad((h, final), leaves, [g.to(t) for g, t in zip(upstream, (h, final))])]


def assert_equals_reference(inputs, tolerance=1e-5, **options):
    wide = torch.complex128 if inputs[0].is_complex() else torch.float64
    want = run([t.to(wide) for t in inputs], backend="reference", **options)
    for got, exact in zip(run(inputs, backend="triton", **options), want):
        error = (got - exact).norm() / exact.norm()
        assert error <= tolerance, error.item()


@both_decays
@both_numbers
@pytest.mark.parametrize("T", [1, 2, 31, 64, 1000, 4096])
def test_equals_reference(T, dtype, constant):
    assert_equals_reference(make_inputs(2, T, 256, dtype=dtype, constant=constant))


@both_numbers
@pytest.mark.parametrize("B, T, D", [(1, 333, 1), (3, 333, 5), (2, 100, 100), (5, 9, 1030)])
def test_odd_shapes(B, T, D, dtype):
    assert_equals_reference(make_inputs(B, T, D, dtype=dtype))


@both_numbers
def test_channels_enough_for_one_chunk(dtype):
    inputs = make_inputs(32, 100, 2048, dtype=dtype)
    assert Launch.of(inputs[0]).chunks == 1
    assert_equals_reference(inputs)


@both_numbers
def test_long_sequence(dtype):
    assert_equals_reference(make_inputs(1, 65536, 64, dtype=dtype))


@both_decays
@both_numbers
def test_documents(dtype, constant):
    bounds = torch.tensor([0, 1, 2, 130, 131, 300, 497, 3000, 4096], dtype=torch.int32, device="cuda")
    assert_equals_reference(make_inputs(1, 4096, 256, 8, dtype, constant), cu_seqlens=bounds)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_narrow_types(dtype, tolerance):
    assert_equals_reference(make_inputs(2, 4096, 256, dtype=dtype), tolerance)


@both_decays
@pytest.mark.parametrize("dtype", [torch.bfloat16, *SINGLE])
def test_same_bits_every_time_without_waiting_for_the_device(dtype, constant):
    inputs = make_inputs(1, 4096, 1024, 3, dtype, constant)
    bounds = torch.tensor([0, 100, 3000, 4096], dtype=torch.int32, device="cuda")
    first = run(inputs, backend="triton", cu_seqlens=bounds)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(inputs, backend="triton", cu_seqlens=bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_a_million_tokens_and_more_than_two_billion_numbers():
    """Offsets of 64 bits: the last tokens must come out as they do alone, for the memory is short."""
    B, T, D, tail = 2, 1 << 20, 1088, 1000
    x = torch.empty(B, T, D, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 1 << 31
    for row in x:
        row.normal_()
    a = torch.full_like(x, 0.5)
    outcomes = []
    for inputs in ((x, a), (x[-1:, -2 * tail :], a[-1:, -2 * tail :])):
        leaves = [t.detach().requires_grad_() for t in inputs]
        h, final = diagonal_scan(*leaves, backend="triton")
        grads = torch.autograd.grad(final.sum(), leaves)
        outcomes.append([h[-1, -tail:], final[-1], *(g[-1, -tail:] for g in grads)])
    for whole, alone in zip(*outcomes):
        torch.testing.assert_close(whole, alone, rtol=1e-2, atol=1e-5)


@both_numbers
def test_in_a_graph_and_compiled(dtype):
    x, a, state = make_inputs(2, 512, 256, dtype=dtype)

    def call():
        return diagonal_scan(x, a, initial_state=state, backend="triton")[0]

    want = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, want)
    assert torch.equal(torch.compile(call, fullgraph=True)(), want)
