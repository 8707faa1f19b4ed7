"""ssd: the chunked form against the step loop in float64, the step loop against the recurrence written out as a sum."""

import functools
import itertools

import pytest
import torch

from riverrun.kernels.ssd import ssd

H, P, N = 4, 3, 5
DOCUMENTS = [1, 9, 1, 1, 17, 4]


def make_inputs(B, T, G=1, D="H", num_states=None, dt_scale=0.3, dtype=torch.float64, seed=0):
    """x, dt, A, B, C, D, initial_state, all leaves."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=dtype)
    shape = {None: None, "H": (H,), "HP": (H, P)}[D]
    inputs = [
        randn(B, T, H, P),
        randn(B, T, H).exp() * dt_scale,
        -randn(H).exp(),
        randn(B, T, G, N),
        randn(B, T, G, N),
        None if shape is None else randn(shape),
        randn(num_states or B, H, P, N),
    ]
    return [None if t is None else t.requires_grad_() for t in inputs]


def run(inputs, **options):
    *tensors, state = inputs
    return ssd(*tensors, initial_state=state, **options)


def forward_and_gradients(inputs, **options):
    y, state = run(inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    return [y, state, *torch.autograd.grad(loss, [t for t in inputs if t is not None])]


def assert_equal_to_reference(inputs, **options):
    got = forward_and_gradients(inputs, backend="chunked", **options)
    options.pop("chunk_size", None)
    expected = forward_and_gradients(inputs, backend="reference", **options)
    for g, e in zip(got, expected):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_reference_is_the_written_out_sum():
    """h_t = Σ_{s≤t} (∏_{s<r≤t} exp(dt_r A)) dt_s x_s B_sᵀ + (∏_{r≤t} exp(dt_r A)) h_0, y_t = h_t C_t + D x_t."""
    T, G = 6, 2
    inputs = make_inputs(1, T, G=G, D="HP")
    y, state = run(inputs, backend="reference")
    x, dt, A, B, C, D, h0 = inputs
    for head in range(H):
        group = head // (H // G)
        decay = [torch.exp(dt[0, r, head] * A[head]) for r in range(T)]
        written = []
        for t in range(T):
            h = h0[0, head] * torch.stack(decay[: t + 1]).prod()
            for s in range(t + 1):
                kept = torch.stack([torch.ones((), dtype=torch.float64), *decay[s + 1 : t + 1]]).prod()
                h = h + kept * dt[0, s, head] * torch.outer(x[0, s, head], B[0, s, group])
            written.append(h @ C[0, t, group] + D[head] * x[0, t, head])
        torch.testing.assert_close(y[0, :, head], torch.stack(written), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state[0, head], h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("D", [None, "H", "HP"])
@pytest.mark.parametrize("T, chunk_size", [(1, 64), (5, 64), (5, 2), (67, 64), (67, 16), (8, 1)])
def test_chunked_equals_reference(T, chunk_size, D, G):
    assert_equal_to_reference(make_inputs(2, T, G=G, D=D), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("G", [1, 2])
def test_chunked_equals_reference_on_documents(G, chunk_size):
    inputs = make_inputs(1, sum(DOCUMENTS), G=G, num_states=len(DOCUMENTS))
    assert_equal_to_reference(inputs, cu_seqlens=bounds_of(DOCUMENTS), chunk_size=chunk_size)


@pytest.mark.parametrize("dt_scale", [1e-6, 30.0, 1e4])
def test_extreme_decay(dt_scale):
    """From hardly any decay to one that underflows to zero within a token: finite, and still equal."""
    assert_equal_to_reference(make_inputs(2, 37, dt_scale=dt_scale), chunk_size=8)


@pytest.mark.parametrize("dt_scale", [0.3, 1e4])
def test_extreme_decay_in_float32_has_finite_gradients(dt_scale):
    inputs = make_inputs(2, 70, dt_scale=dt_scale, dtype=torch.float32)
    assert all(torch.isfinite(t).all() for t in forward_and_gradients(inputs, backend="chunked"))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_equal_separate_sequences(backend):
    inputs = make_inputs(1, sum(DOCUMENTS), G=2, num_states=len(DOCUMENTS))
    y, states = run(inputs, cu_seqlens=bounds_of(DOCUMENTS), backend=backend, chunk_size=4)
    x, dt, A, B, C, D, h0 = inputs
    bounds = bounds_of(DOCUMENTS).tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows = [t[:, start:end] for t in (x, dt, B, C)]
        alone, state = ssd(*rows[:2], A, *rows[2:], D, initial_state=h0[i : i + 1], backend=backend, chunk_size=4)
        torch.testing.assert_close(y[:, start:end], alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(states[i : i + 1], state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 16, 19])
def test_handing_over_the_state_equals_one_call(cut):
    x, dt, A, B, C, D, h0 = make_inputs(2, 20, G=2)
    y, state = ssd(x, dt, A, B, C, D, initial_state=h0, chunk_size=8)
    head = [t[:, :cut] for t in (x, dt, B, C)]
    tail = [t[:, cut:] for t in (x, dt, B, C)]
    y1, h = ssd(*head[:2], A, *head[2:], D, initial_state=h0, chunk_size=8)
    y2, h = ssd(*tail[:2], A, *tail[2:], D, initial_state=h, chunk_size=8)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(h, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softplus", [False, True])
def test_bias_and_softplus_of_the_step_sizes(softplus, dtype):
    """In the precision of the op, from dt in its own type; the gradients go to dt and the bias."""
    x, dt, A, B, C, D, h0 = make_inputs(2, 9)
    raw, bias = dt.detach().to(dtype).requires_grad_(), torch.rand(H, dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "chunked"):
        options = {"initial_state": h0, "backend": backend}
        made = raw.double() + bias
        made = torch.nn.functional.softplus(made) if softplus else made
        got, _ = ssd(x, raw, A, B, C, D, dt_bias=bias, dt_softplus=softplus, **options)
        want, _ = ssd(x, made, A, B, C, D, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        grads = [torch.autograd.grad(y.square().sum(), (raw, bias)) for y in (got, want)]
        assert grads[0][0].dtype == dtype
        for g, e in zip(*grads):
            torch.testing.assert_close(g, e, rtol=0, atol=0)


def test_no_initial_state_is_zeros():
    inputs = make_inputs(2, 9)
    zeros = [*inputs[:-1], torch.zeros_like(inputs[-1])]
    for backend in ("reference", "chunked"):
        torch.testing.assert_close(run([*inputs[:-1], None], backend=backend), run(zeros, backend=backend))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_is_near_float64(dtype, tolerance, autocast):
    """Inputs are rounded first, so what is left is float32 arithmetic and, for bfloat16, rounding of the output."""
    inputs = [t.detach().to(dtype) for t in make_inputs(2, 67, G=2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = run(inputs, backend="chunked")
    exact_y, exact_state = run([t.double() for t in inputs], backend="reference")
    assert y.dtype == dtype and state.dtype == torch.float32
    assert (y - exact_y).norm() < tolerance * exact_y.norm()
    assert (state - exact_state).norm() < 1e-5 * exact_state.norm()


def test_compiles_without_graph_breaks():
    inputs = make_inputs(2, 20, G=2)
    compiled = torch.compile(functools.partial(ssd, chunk_size=8), backend="aot_eager", fullgraph=True)
    *tensors, h0 = inputs
    torch.testing.assert_close(compiled(*tensors, initial_state=h0), ssd(*tensors, initial_state=h0))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x", (2, 6, H)),
        ("x", (2, 0, H, P)),
        ("dt", (2, 5, H)),
        ("A", (H, 1)),
        ("B", (2, 6, 3, N)),
        ("B", (2, 5, 1, N)),
        ("C", (2, 6, 1, N + 1)),
        ("D", (P,)),
        ("dt_bias", (1,)),
        ("initial_state", (1, H, P, N)),
    ],
)
def test_bad_shapes(name, shape):
    names = ["x", "dt", "A", "B", "C", "D", "initial_state"]
    arguments = dict(zip(names, make_inputs(2, 6)))
    arguments[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"ssd: {name} must have shape \("):
        ssd(**arguments)


def test_bad_options():
    inputs = make_inputs(1, 6)
    with pytest.raises(ValueError, match="chunk_size"):
        run(inputs, chunk_size=0)
    with pytest.raises(ValueError, match="initial_state"):
        run(inputs, cu_seqlens=bounds_of([2, 4]))
    with pytest.raises(ValueError, match="backend"):
        run(inputs, backend="fast")
    for backend in ("reference", "chunked"):
        with pytest.raises(ValueError, match="cu_seqlens"):
            run(inputs, cu_seqlens=torch.tensor([0, 5]), backend=backend)
