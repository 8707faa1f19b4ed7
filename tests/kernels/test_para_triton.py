"""The Triton kernels of para_gru and para_lstm, run by Triton's interpreter, against the step loop in float64; and
compiled for GPUs."""

from pathlib import Path

import pytest
import torch
from compiling import CARDS

from riverrun.kernels.common.shooting import take_statistics
from riverrun.kernels.para_gru import para_gru, para_gru_slope
from riverrun.kernels.para_lstm import para_lstm, para_lstm_slope

D = 5
OPS = {"para_gru": para_gru, "para_lstm": para_lstm}
SLOPES = {"para_gru": para_gru_slope, "para_lstm": para_lstm_slope}
both = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def statistics():
    take_statistics()


def make_inputs(op, B, T, S=None, bound=0.5, gate_scale=1.0, retention=0.0):
    """gates, weight, (peephole,) bias, initial_state."""
    lstm = op == "para_lstm"
    gates = torch.randn(B, T, 3, D) * gate_scale
    gates[:, :, 0] += retention if lstm else -retention
    inputs = [gates, (torch.rand(3, D) * 2 - 1) * bound]
    if lstm:
        inputs.append((torch.rand(2, D) * 2 - 1) * bound)
    state = torch.randn(S or B, 2, D) if lstm else torch.randn(S or B, D)
    return [*inputs, torch.randn(3, D) / 10, state]


def run(op, inputs, dtype, use_state=True, **options):
    """h, final state and the gradients of all inputs, under the same upstream gradients for every dtype."""
    *leaves, state = [x.to(dtype).requires_grad_() for x in inputs]
    *tensors, bias = leaves
    h, final = OPS[op](*tensors, bias=bias, initial_state=state if use_state else None, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (h, final)]
    wanted = [*leaves, state] if use_state else leaves
    return [h, final, *torch.autograd.grad((h, final), wanted, upstream)]


def assert_equals_reference(op, inputs, tolerance=1e-5, use_state=True, cu_seqlens=None, **options):
    want = run(op, inputs, torch.float64, use_state, cu_seqlens=cu_seqlens, backend="reference")
    got = run(op, inputs, torch.float32, use_state, cu_seqlens=cu_seqlens, backend="triton", **options)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= tolerance * b.norm().clamp_min(1e-6)


@both
@pytest.mark.parametrize("T, chunk_size", [(1, None), (2, None), (31, 31), (31, 8), (64, 16)])
def test_equals_reference(op, T, chunk_size):
    assert_equals_reference(op, make_inputs(op, 2, T), chunk_size=chunk_size)
    counted = take_statistics()[op]
    assert (counted.pieces, counted.sequential)[chunk_size in (None, 31)] > 0
    assert counted.fallbacks == 0 and counted.change <= 1e-5


@both
@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("use_state", [True, False])
def test_documents_start_anywhere(op, chunk_size, use_state):
    lengths = [1, 9, 30, 1, 1, 17, 2, 8]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = make_inputs(op, 1, sum(lengths), S=len(lengths))
    assert_equals_reference(op, inputs, use_state=use_state, cu_seqlens=bounds, chunk_size=chunk_size)


@both
def test_every_place_of_a_bound(op):
    inputs = make_inputs(op, 1, 10, S=2)
    for bound in range(1, 10):
        bounds = torch.tensor([0, bound, 10], dtype=torch.int32)
        assert_equals_reference(op, inputs, cu_seqlens=bounds, chunk_size=8)


@both
def test_saturated_gates(op):
    assert_equals_reference(op, make_inputs(op, 1, 40, gate_scale=20), chunk_size=8)
    assert_equals_reference(op, make_inputs(op, 1, 40, gate_scale=1e3), chunk_size=8)


@both
def test_long_memory_takes_more_passes(op):
    """The guesses that the burn-in gives are wrong then, and corrected through the chunks' Jacobians."""
    assert_equals_reference(op, make_inputs(op, 1, 128, retention=6), chunk_size=16)
    counted = take_statistics()[op]
    assert 1 < counted.passes < 8 and counted.fallbacks == 0


@both
def test_weights_far_beyond_contraction_fall_back(op):
    """The states are chaotic: no shooting pass is to be believed, and the chunks run one after another."""
    inputs = make_inputs(op, 1, 128, bound=4, gate_scale=0.3)
    want = run(op, inputs, torch.float32, backend="reference")
    got = run(op, inputs, torch.float32, backend="triton", chunk_size=16, max_passes=2)
    counted = take_statistics()[op]
    assert counted.fallbacks == counted.pieces == 1
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in got)


@both
def test_narrow_types(op):
    """h is rounded, the state is not; the gradient belongs to the unrounded trajectory."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs = make_inputs(op, 1, 40)
        inputs[0] = inputs[0].to(dtype)
        want = run(op, inputs, torch.float64, backend="reference")
        *leaves, state = [x.requires_grad_() for x in inputs]
        *tensors, bias = leaves
        h, final = OPS[op](*tensors, bias=bias, initial_state=state, backend="triton", chunk_size=8)
        assert h.dtype == dtype and final.dtype == torch.float32
        assert (h - want[0]).norm() <= 4e-3 * want[0].norm()
        assert (final - want[1]).norm() <= 1e-5 * want[1].norm()
        (grad,) = torch.autograd.grad(final.sum(), tensors[0])
        assert grad.dtype == dtype and grad.isfinite().all()


@both
def test_without_gradients_nothing_is_saved_and_all_is_equal(op):
    inputs = make_inputs(op, 1, 40)
    *tensors, bias, state = inputs
    with torch.no_grad():
        plain = OPS[op](*tensors, bias=bias, initial_state=state, backend="triton", chunk_size=8)
    torch.testing.assert_close(plain, tuple(run(op, inputs, torch.float32, backend="triton", chunk_size=8)[:2]))


@both
def test_the_operator_tells_torch_its_shapes(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def shapes():
        *tensors, bias, state = (x.requires_grad_() for x in make_inputs(op, 2, 24))
        h, final = OPS[op](*tensors, bias=bias, initial_state=state, backend="triton")
        grads = torch.autograd.grad((h.sum(), final.sum()), [*tensors, bias, state])
        return [(x.shape, x.dtype, x.stride()) for x in (h, final, *grads)]

    real = shapes()
    with FakeTensorMode():
        assert shapes() == real


def test_double_precision_is_for_torch():
    gates, weight = torch.zeros(1, 4, 3, D, dtype=torch.float64), torch.zeros(3, D)
    with pytest.raises(ValueError, match="use backend='chunked' for float64"):
        para_gru(gates, weight, backend="triton")
    with pytest.raises(ValueError, match=r"bias must have shape \(3, D\)"):
        para_gru(gates, weight, bias=torch.zeros(D))


@pytest.mark.parametrize("card", CARDS)
def test_compiles_for(card):
    compile_kernels, shared_limit = CARDS[card]
    kernels = compile_kernels(Path(__file__).with_name("launches_para.py"))
    assert {k["kernel"] for k in kernels} == {"forward_kernel", "backward_kernel", "_starts_kernel", "slope_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= shared_limit, kernel
        assert kernel["stack"] <= 16, f"spills: {kernel}"
        assert kernel["kernel"] == "backward_kernel" or kernel["registers"] <= 184, kernel
        # a layout that does not suit the loads is converted at every step, through shared memory
        assert kernel["converts"] <= 8, kernel


@both
@pytest.mark.parametrize("bounds", [None, [0, 1, 12, 29, 37]], ids=["rows", "documents"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_slope_equals_autograd_of_the_reference(op, bounds, use_bias):
    S, T = (3, 37) if bounds is None else (len(bounds) - 1, 37)
    *tensors, bias, _ = make_inputs(op, S if bounds is None else 1, T, S, retention=3.0)
    options = {"cu_seqlens": None if bounds is None else torch.tensor(bounds, dtype=torch.int32)}
    got = SLOPES[op](*tensors, bias=bias if use_bias else None, backend="triton", **options)

    def end(state):
        double = [x.double() for x in tensors]
        given = {"bias": bias.double()} if use_bias else {}
        return OPS[op](*double, initial_state=state, backend="reference", **given, **options)[1]

    K = 2 if op == "para_lstm" else 1
    start = torch.zeros(S, *(2,) * (K - 1), D, dtype=torch.float64)
    whole = torch.autograd.functional.jacobian(end, start).reshape(S, K, D, S, K, D)
    places = torch.arange(S)[:, None], torch.arange(D)[None, :]
    want = whole.permute(0, 3, 2, 5, 1, 4)[places[0], places[0], places[1], places[1]].permute(0, 2, 3, 1)
    assert got.shape == (S, K, K, D) and want.abs().max() > 1e-3
    assert (got - want).norm() <= 1e-5 * want.norm()
    torch.testing.assert_close(SLOPES[op](*tensors, bias=bias if use_bias else None, backend="chunked", **options), got)
