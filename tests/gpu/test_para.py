"""The Triton kernels of para_gru and para_lstm on real shapes, against the step loop in float64 on the same card."""

import pytest
import torch

from riverrun.kernels.common.shooting import take_statistics
from riverrun.kernels.para_gru import para_gru, para_gru_slope
from riverrun.kernels.para_lstm import para_lstm, para_lstm_slope

OPS = {"para_gru": para_gru, "para_lstm": para_lstm}
SLOPES = {"para_gru": para_gru_slope, "para_lstm": para_lstm_slope}
both = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def statistics():
    take_statistics()


def make_inputs(op, B, T, D=256, S=None, bound=0.5, gate_scale=1.0, retention=0.0, dtype=torch.float32):
    """gates, weight, (peephole,) bias, initial_state."""
    lstm = op == "para_lstm"
    gates = torch.randn(B, T, 3, D, device="cuda") * gate_scale
    gates[:, :, 0] += retention if lstm else -retention
    inputs = [gates.to(dtype), (torch.rand(3, D, device="cuda") * 2 - 1) * bound]
    if lstm:
        inputs.append((torch.rand(2, D, device="cuda") * 2 - 1) * min(bound, 1))
    state = torch.randn(S or B, *((2, D) if lstm else (D,)), device="cuda")
    return [*inputs, torch.randn(3, D, device="cuda") / 10, state]


def run(op, inputs, dtype=None, **options):
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    *tensors, bias, state = leaves
    h, final = OPS[op](*tensors, bias=bias, initial_state=state, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in (h, final)]
    return [h, final, *torch.autograd.grad((h, final), leaves, upstream)]


def assert_equals_reference(op, inputs, tolerance, **options):
    want = run(op, inputs, torch.float64, backend="reference", cu_seqlens=options.get("cu_seqlens"))
    got = run(op, inputs, backend="triton", **options)
    for a, b in zip(got, want):
        error = (a - b).norm() / b.norm().clamp_min(1e-9)
        assert error <= tolerance, error.item()
    return (got[0] - want[0]).abs().max().item()


@both
@pytest.mark.parametrize("T", [1, 2, 31, 64, 1000, 4096])
def test_equals_reference(op, T):
    inputs = make_inputs(op, 2, T)
    inputs[0][:, :, 0, ::2] += 5 if op == "para_lstm" else -5  # every other channel has a long memory
    assert assert_equals_reference(op, inputs, 1e-5) <= 1e-4


def test_equals_reference_on_a_long_sequence():
    assert_equals_reference("para_gru", make_inputs("para_gru", 1, 32768, D=64), 1e-5)


@both
@pytest.mark.parametrize("bound", [0.9, 2.0, 3.0])
def test_weights_beyond_contraction(op, bound):
    """At 3 the loss is so steep in the states that float32 itself errs by 1e-4 in the gradients."""
    assert assert_equals_reference(op, make_inputs(op, 2, 1000, bound=bound), 1e-3, chunk_size=64) <= 1e-4


@both
def test_saturated_gates(op):
    assert_equals_reference(op, make_inputs(op, 2, 500, gate_scale=20), 1e-5, chunk_size=64)


@both
@pytest.mark.parametrize("chunk_size", [None, 64])
def test_documents(op, chunk_size):
    bounds = torch.tensor([0, 1, 2, 130, 131, 300, 497, 500], dtype=torch.int32, device="cuda")
    inputs = make_inputs(op, 1, 500, S=7)
    assert_equals_reference(op, inputs, 1e-5, cu_seqlens=bounds, chunk_size=chunk_size)


@both
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_narrow_types(op, dtype, tolerance):
    assert_equals_reference(op, make_inputs(op, 2, 500, dtype=dtype), tolerance)


@both
def test_same_bits_every_time_without_waiting_for_the_device(op):
    inputs = make_inputs(op, 1, 4096, D=1024, S=3, retention=3, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 100, 3000, 4096], dtype=torch.int32, device="cuda")
    first = run(op, inputs, backend="triton", cu_seqlens=bounds)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(op, inputs, backend="triton", cu_seqlens=bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@both
def test_a_million_tokens_and_more_than_two_billion_numbers(op):
    """Offsets of 64 bits: the last tokens must come out as they do alone, for the memory is short."""
    B, T, D, tail = 2, 1 << 20, 512, 1000
    gates = torch.empty(B, T, 3, D, device="cuda", dtype=torch.bfloat16)
    assert gates.numel() > 1 << 31
    for row in gates:
        row.normal_()
    _, *weights, _, _ = make_inputs(op, 1, 1, D=D)
    outcomes = []
    for x in (gates, gates[-1:, -2 * tail :].contiguous()):
        h, final = OPS[op](x.requires_grad_(), *weights, backend="triton")
        (grad,) = torch.autograd.grad(h, x, torch.ones_like(h))
        outcomes.append((h[-1, -tail:], final[-1], grad[-1, -tail:]))
    for whole, alone in zip(*outcomes):
        torch.testing.assert_close(whole, alone, rtol=1e-2, atol=1e-4)


@both
def test_in_a_graph_and_compiled(op):
    *tensors, bias, state = make_inputs(op, 2, 512)

    def call():
        return OPS[op](*tensors, bias=bias, initial_state=state, backend="triton")[0]

    want = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, want)
    assert torch.equal(torch.compile(call, fullgraph=True)(), want)


@both
@pytest.mark.parametrize("bounds", [None, [0, 1, 700, 1024]], ids=["rows", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slope_equals_autograd_of_the_solver(op, bounds, dtype):
    *tensors, bias, _ = make_inputs(op, 1 if bounds else 2, 1024, D=2048, dtype=dtype)
    tensors[0][:, :, 0] += 5.5 if op == "para_lstm" else -5.5  # states are remembered for about 250 tokens
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    got = SLOPES[op](*tensors, bias=bias, cu_seqlens=cu_seqlens, backend="triton")
    double = [x.double() for x in tensors]
    want = SLOPES[op](*double, bias=bias.double(), cu_seqlens=cu_seqlens, backend="chunked")
    assert want.abs().max() > 1e-3
    assert (got - want).norm() <= 1e-4 * want.norm()
