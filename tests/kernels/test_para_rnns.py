"""para_gru and para_lstm: the step loops against torch's own cells, the shooting solver against the step loops."""

import functools
import itertools
import math
import warnings

import pytest
import torch

from riverrun.kernels.common.shooting import take_statistics
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm

D = 4
DOCUMENTS = [1, 9, 30, 1, 17, 2]
OPS = {"para_gru": para_gru, "para_lstm": para_lstm}
both = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def statistics():
    take_statistics()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "para_.*did not converge")
        yield


def make_inputs(op, B, T, num_states=None, bound=0.5, gate_scale=1.0, dtype=torch.float64):
    """gates, weight, (peephole,) initial_state, all leaves."""
    S = num_states or B
    inputs = [torch.randn(B, T, 3, D) * gate_scale, (torch.rand(3, D) * 2 - 1) * bound]
    if op == "para_lstm":
        inputs += [(torch.rand(2, D) * 2 - 1) * bound, torch.randn(S, 2, D)]
    else:
        inputs.append(torch.randn(S, D))
    return [t.to(dtype).requires_grad_() for t in inputs]


def run(op, inputs, **options):
    *tensors, state = inputs
    return OPS[op](*tensors, initial_state=state, **options)


def forward_and_gradients(op, inputs, **options):
    h, state = run(op, inputs, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (h, state)]
    return [h, state, *torch.autograd.grad((h, state), inputs, upstream)]


def assert_equals_reference(op, inputs, cu_seqlens=None, **options):
    options = {"tolerance": 1e-12, "backend": "chunked"} | options
    got = forward_and_gradients(op, inputs, cu_seqlens=cu_seqlens, **options)
    want = forward_and_gradients(op, inputs, cu_seqlens=cu_seqlens, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def diagonal(rows):
    """(G, D) → (G·D, D), the weight of a dense cell."""
    return torch.cat([torch.diag(row) for row in rows])


def test_gru_reference_is_the_gru_of_torch():
    """Whose z is one minus ours, and whose r follows the recurrent weight: the same where that is diagonal."""
    gates, weight, h0 = (t.detach() for t in make_inputs("para_gru", 2, 6, bound=2))
    cell = torch.nn.GRUCell(3 * D, D, bias=False, dtype=torch.float64)
    (u_z, u_r, u_n), (a_z, a_r, a_n) = gates.unbind(2), weight
    cell.weight_ih.data = torch.eye(3 * D, dtype=torch.float64)
    cell.weight_hh.data = diagonal([a_r, -a_z, a_n])
    h, want = h0, []
    for x in torch.cat([u_r, -u_z, u_n], dim=-1).unbind(1):
        h = cell(x, h)
        want.append(h)
    got = para_gru(gates, weight, initial_state=h0, backend="reference")
    torch.testing.assert_close(got, (torch.stack(want, 1), h), rtol=1e-12, atol=1e-12)


def test_lstm_reference_without_peepholes_is_the_lstm_of_torch():
    """With the input gate of pre-activation −f, which makes it 1 − f."""
    gates, weight, _, state = (t.detach() for t in make_inputs("para_lstm", 2, 6, bound=2))
    cell = torch.nn.LSTMCell(4 * D, D, bias=False, dtype=torch.float64)
    (u_f, u_o, u_c), (a_f, a_o, a_c) = gates.unbind(2), weight
    cell.weight_ih.data = torch.eye(4 * D, dtype=torch.float64)
    cell.weight_hh.data = diagonal([-a_f, a_f, a_c, a_o])
    (c, h), want = state.unbind(1), []
    for x in torch.cat([-u_f, u_f, u_c, u_o], dim=-1).unbind(1):
        h, c = cell(x, (h, c))
        want.append(h)
    got = para_lstm(gates, weight, torch.zeros_like(weight[:2]), initial_state=state, backend="reference")
    torch.testing.assert_close(got, (torch.stack(want, 1), torch.stack([c, h], 1)), rtol=1e-12, atol=1e-12)


def test_lstm_reference_with_peepholes_in_scalars():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    gates, weight, peephole, state = (t.detach() for t in make_inputs("para_lstm", 1, 3, bound=2))
    h_all, final = para_lstm(gates, weight, peephole, initial_state=state, backend="reference")
    for d in range(D):
        (a_f, a_o, a_c), (c_f, c_o) = weight[:, d].tolist(), peephole[:, d].tolist()
        c, h = state[0, :, d].tolist()
        for t in range(3):
            u_f, u_o, u_c = gates[0, t, :, d].tolist()
            f = sigmoid(u_f + a_f * h + c_f * c)
            c = f * c + (1 - f) * math.tanh(u_c + a_c * h)
            h = sigmoid(u_o + a_o * h + c_o * c) * math.tanh(c)
            assert h_all[0, t, d].item() == pytest.approx(h, abs=1e-12)
        assert final[0, :, d].tolist() == pytest.approx([c, h], abs=1e-12)


@both
@pytest.mark.parametrize("bound", [0.5, 0.9, 3.0])
@pytest.mark.parametrize("T, chunk_size", [(1, 4), (7, 1), (7, 3), (7, None), (67, 1), (67, 16), (67, 67), (67, None)])
def test_chunked_equals_reference(op, T, chunk_size, bound):
    assert_equals_reference(op, make_inputs(op, 2, T, bound=bound), chunk_size=chunk_size)


@both
@pytest.mark.parametrize("bound", [0.5, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 100, None])
def test_chunked_equals_reference_on_documents(op, chunk_size, bound):
    inputs = make_inputs(op, 1, sum(DOCUMENTS), num_states=len(DOCUMENTS), bound=bound)
    assert_equals_reference(op, inputs, bounds_of(DOCUMENTS), chunk_size=chunk_size)


@both
@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("gate_scale", [0.0, 20.0, 1e3])
def test_extreme_gates(op, gate_scale, chunk_size):
    """Saturated gates: the state is kept or overwritten, and nothing overflows."""
    assert_equals_reference(op, make_inputs(op, 2, 37, gate_scale=gate_scale), chunk_size=chunk_size)


@both
def test_retentive_channels(op):
    """A write gate near zero (forget gate near one) carries the state through every chunk."""
    inputs = make_inputs(op, 2, 67)
    with torch.no_grad():
        inputs[0][:, :, 0] += -8 if op == "para_gru" else 8
    assert_equals_reference(op, inputs, chunk_size=8)
    assert take_statistics()[op].fallbacks == 0


@both
def test_stepping_through_time_is_chosen_for_many_lanes(op):
    inputs = make_inputs(op, 128, 40)
    assert_equals_reference(op, inputs)
    assert take_statistics()[op].sequential == 1
    inputs = make_inputs(op, 2, 40)
    assert_equals_reference(op, inputs)
    statistics = take_statistics()[op]
    assert statistics.sequential == 0 and statistics.pieces == 1


@both
def test_contractive_weights_converge_in_few_passes(op):
    inputs = make_inputs(op, 2, 256, dtype=torch.float32)
    run(op, inputs, chunk_size=16, backend="chunked")
    statistics = take_statistics()[op]
    assert statistics.pieces == 1 and statistics.fallbacks == 0
    assert 2 <= statistics.passes <= 4 and statistics.change <= 1e-5
    assert take_statistics() == {}


@both
def test_convergence_is_quadratic(op):
    """The mark of a right Jacobian: 64 short chunks of retentive channels, to float64's accuracy."""
    inputs = make_inputs(op, 2, 256, bound=0.9)
    with torch.no_grad():
        inputs[0][:, :, 0] += -3 if op == "para_gru" else 3
    run(op, inputs, chunk_size=4, tolerance=1e-13, max_passes=20, backend="chunked")
    assert take_statistics()[op].passes <= 8


@both
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_passes", [1, 2, 5])
def test_unconverged_solves_are_finished_step_by_step(op, max_passes, packed):
    """Too few passes for the tolerance: exact all the same, and reported."""
    num_states = len(DOCUMENTS) if packed else 2
    inputs = make_inputs(op, 1 if packed else 2, sum(DOCUMENTS), num_states=num_states, bound=3.0)
    cu_seqlens = bounds_of(DOCUMENTS) if packed else None
    options = {"chunk_size": 2, "max_passes": max_passes, "tolerance": 1e-14, "backend": "chunked"}
    with pytest.warns(RuntimeWarning, match=f"{op}: shooting did not converge"):
        run(op, inputs, cu_seqlens=cu_seqlens, **options)
    statistics = take_statistics()[op]
    assert (statistics.pieces, statistics.fallbacks, statistics.passes) == (1, 1, max_passes)
    assert_equals_reference(op, inputs, cu_seqlens, **options)


def chaotic_inputs(T):
    """A GRU whose map h → h' has slope far above 1 in magnitude at its fixed points: nearby states part."""
    gates = torch.zeros(1, T, 3, D, dtype=torch.float64)
    gates[:, :, 0], gates[:, :, 1] = 4.0, 4.0
    gates[:, :, 2] = 0.1 * torch.randn(T, D, dtype=torch.float64)
    weight = torch.tensor([2.0, -3.0, -3.0], dtype=torch.float64)[:, None].repeat(1, D)
    return [t.requires_grad_() for t in (gates, weight, torch.full((1, D), 0.3, dtype=torch.float64))]


def test_chaotic_weights_give_the_right_answer():
    inputs = chaotic_inputs(40)
    assert_equals_reference("para_gru", inputs, chunk_size=4, max_passes=3)
    assert take_statistics()["para_gru"].fallbacks == 1


@pytest.mark.parametrize("forgets", [False, True])
def test_small_error_that_grows_is_not_convergence(forgets):
    """The first chunk ends within 6e-6 of its guess, 0, an unstable fixed point that all later tokens move away from.

    The default tolerance is above 6e-6, and with `forgets` every chunk ends in 0 whatever happened inside it.
    """
    gates = torch.zeros(1, 32, 3, 1, dtype=torch.float64)
    z, r, _ = gates.unbind(2)
    z[:, :7], z[:, 7:] = -40.0, 12.0
    r[:, :8], r[:, 8:] = -40.0, 10.0
    if forgets:
        z[:, 15::8], r[:, 15::8] = 40.0, -40.0
    weight = torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64)
    options = {"initial_state": torch.full((1, 1), 0.9, dtype=torch.float64)}
    want, _ = para_gru(gates, weight, backend="reference", **options)
    assert want[:, 8:].max() > 0.01
    h, _ = para_gru(gates, weight, backend="chunked", chunk_size=8, **options)
    torch.testing.assert_close(h, want, rtol=1e-9, atol=1e-9)
    assert take_statistics()["para_gru"].fallbacks == 0


@both
def test_not_a_number_is_returned_and_reported(op):
    inputs = make_inputs(op, 1, 24)
    with torch.no_grad():
        inputs[0][:, 6] = math.nan
    h, _ = run(op, inputs, chunk_size=2, backend="chunked")
    torch.testing.assert_close(h, run(op, inputs, backend="reference")[0], equal_nan=True)
    assert take_statistics()[op].fallbacks == 1


@both
@pytest.mark.parametrize("chunk_size", [4, 500, 1500])
def test_jacobians_that_overflow(op, chunk_size):
    """At the unstable fixed point h = 0 every step has slope 1.25, and 1.25⁵⁰⁰ is no float32; yet no later token has a
    gradient to carry back."""
    inputs = [torch.zeros_like(t) for t in make_inputs(op, 1, 1500, dtype=torch.float32)]
    inputs[1] += 3.0
    inputs = [t.requires_grad_() for t in inputs]
    h, _ = run(op, inputs, chunk_size=chunk_size, backend="chunked")
    assert take_statistics()[op].fallbacks == 0
    grad = torch.autograd.grad(h[:, :10].sum(), inputs[0])[0]
    want = torch.autograd.grad(run(op, inputs, backend="reference")[0][:, :10].sum(), inputs[0])[0]
    assert not grad[:, 10:].any()
    torch.testing.assert_close(grad, want)


@both
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_equal_separate_sequences(op, backend):
    inputs = make_inputs(op, 1, sum(DOCUMENTS), num_states=len(DOCUMENTS))
    options = {"backend": backend, "chunk_size": 4, "tolerance": 1e-12}
    h, states = run(op, inputs, cu_seqlens=bounds_of(DOCUMENTS), **options)
    gates, *weights, h0 = inputs
    for i, (start, end) in enumerate(itertools.pairwise(bounds_of(DOCUMENTS).tolist())):
        alone, state = run(op, [gates[:, start:end], *weights, h0[i : i + 1]], **options)
        torch.testing.assert_close(h[:, start:end], alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(states[i : i + 1], state, rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("cut", [1, 13, 19])
def test_two_calls_equal_one(op, cut):
    gates, *weights, h0 = make_inputs(op, 2, 20)
    options = {"chunk_size": 8, "tolerance": 1e-12}
    h, state = run(op, [gates, *weights, h0], **options)
    h1, between = run(op, [gates[:, :cut], *weights, h0], **options)
    h2, last = run(op, [gates[:, cut:], *weights, between], **options)
    torch.testing.assert_close((torch.cat([h1, h2], 1), last), (h, state), rtol=1e-10, atol=1e-10)


@both
def test_no_initial_state_is_zeros(op):
    *tensors, state = make_inputs(op, 2, 9)
    for backend in ("reference", "chunked"):
        got = OPS[op](*tensors, backend=backend)
        torch.testing.assert_close(got, OPS[op](*tensors, initial_state=state * 0, backend=backend))


@both
@pytest.mark.parametrize("packed, chunk_size", [(False, 2), (False, None), (True, 2)])
def test_gradcheck(op, packed, chunk_size):
    inputs = make_inputs(op, 1, 5, num_states=2 if packed else 1, bound=0.9)
    cu_seqlens = bounds_of([1, 4]) if packed else None
    options = {"backend": "chunked", "chunk_size": chunk_size, "tolerance": 1e-14, "cu_seqlens": cu_seqlens}
    assert torch.autograd.gradcheck(lambda *inputs: run(op, inputs, **options), inputs)


@both
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 16, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_low_precision_is_near_float64(op, dtype, tolerance, chunk_size, autocast):
    """Gates are rounded first, so what is left is float32 arithmetic and, for bfloat16, rounding of the results."""
    gates, *rest = make_inputs(op, 2, 300, dtype=torch.float32)
    inputs = [gates.detach().to(dtype).requires_grad_(), *rest]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = forward_and_gradients(op, inputs, backend="chunked", chunk_size=chunk_size)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = forward_and_gradients(op, exact, backend="reference")
    assert got[0].dtype == got[2].dtype == dtype and got[1].dtype == got[3].dtype == torch.float32
    for g, w in zip(got, want):
        assert torch.isfinite(g).all()
        assert (g - w).norm() < tolerance * w.norm()
    assert (got[1] - want[1]).norm() < 1e-4 * want[1].norm()  # the state never was bfloat16


@both
def test_compiles_without_graph_breaks(op):
    inputs = make_inputs(op, 2, 20)
    function = functools.partial(forward_and_gradients, op, chunk_size=8, backend="chunked")
    *tensors, h0 = inputs

    def call(*inputs):
        return run(op, inputs, chunk_size=8, backend="chunked")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    h, state = compiled(*tensors, h0)
    want = function(inputs)
    torch.testing.assert_close((h, state), tuple(want[:2]))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (h, state)]
    torch.testing.assert_close(list(torch.autograd.grad((h, state), inputs, upstream)), want[2:])


@both
def test_operator_is_registered_soundly(op):
    """Schema, fake implementation, gradient registration and AOT dispatch, as torch checks them."""
    from riverrun.kernels.para_gru.chunked import para_gru_chunked
    from riverrun.kernels.para_lstm.chunked import para_lstm_chunked

    gates, *weights, h0 = make_inputs(op, 2, 9)
    operator = para_gru_chunked if op == "para_gru" else para_lstm_chunked
    h0 = h0 if h0.dim() == 3 else h0[:, None]
    arguments = (gates, torch.cat(weights), h0.detach().requires_grad_(), None, 4, 1e-12, 8)
    torch.library.opcheck(operator.overload, arguments)


@both
@pytest.mark.parametrize(
    "name, shape",
    [
        ("gates", (2, 6, D)),
        ("gates", (2, 0, 3, D)),
        ("gates", (2, 6, 4, D)),
        ("weight", (2, D)),
        ("initial_state", (3, D)),
    ],
)
def test_bad_shapes(op, name, shape):
    names = ["gates", "weight", *(["peephole"] if op == "para_lstm" else []), "initial_state"]
    arguments = dict(zip(names, make_inputs(op, 2, 6)))
    arguments[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{op}: {name} must have shape"):
        OPS[op](**arguments)


def test_bad_peephole():
    gates, weight, _, state = make_inputs("para_lstm", 2, 6)
    with pytest.raises(ValueError, match="para_lstm: peephole must have shape"):
        para_lstm(gates, weight, weight, initial_state=state)


@both
def test_bad_options(op):
    *tensors, _ = make_inputs(op, 2, 6)
    for name, value in [("chunk_size", 0), ("max_passes", 0), ("tolerance", 0.0), ("backend", "fast")]:
        with pytest.raises(ValueError, match=name):
            OPS[op](*tensors, **{name: value})
    one_row = [tensors[0][:1], *tensors[1:]]
    for backend in ("reference", "chunked"):
        with pytest.raises(ValueError, match="one row"):
            OPS[op](*tensors, cu_seqlens=bounds_of([2, 4]), backend=backend)
        with pytest.raises(ValueError, match="rise strictly"):
            OPS[op](*one_row, cu_seqlens=bounds_of([2, 3]), backend=backend)
