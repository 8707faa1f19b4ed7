"""gated_delta: the chunked form against the step loop in float64, the step loop against explicit matrix products."""

import functools
import itertools

import pytest
import torch

from riverrun.kernels.gated_delta import gated_delta

H, K, V = 2, 4, 3
DOCUMENTS = [1, 9, 1, 1, 17, 4]


def make_inputs(B, T, n=1, gate="mild", num_states=None, dtype=torch.float64, seed=0):
    """q, k, v, beta, g, initial_state, all leaves; keys of unit length, beta in [0, 2]."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=dtype)
    rand = functools.partial(torch.rand, generator=generator, dtype=dtype)
    g = -rand(B, T, H)
    if gate == "strong":
        g[:, ::2] = -30.0
    inputs = [
        randn(B, T, H, K),
        torch.nn.functional.normalize(randn(B, T, n, H, K), dim=-1),
        randn(B, T, n, H, V),
        2 * rand(B, T, n, H),
        None if gate is None else g,
        randn(num_states or B, H, K, V),
    ]
    return [None if t is None else t.requires_grad_() for t in inputs]


def run(inputs, **options):
    *tensors, state = inputs
    return gated_delta(*tensors, initial_state=state, **options)


def forward_and_gradients(inputs, **options):
    o, state = run(inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (o, state)]
    loss = (o * weights[0]).sum() + (state * weights[1]).sum()
    return [o, state, *torch.autograd.grad(loss, [t for t in inputs if t is not None])]


def assert_equal_to_reference(inputs, **options):
    got = forward_and_gradients(inputs, backend="chunked", **options)
    options.pop("chunk_size", None)
    expected = forward_and_gradients(inputs, backend="reference", **options)
    for g, e in zip(got, expected):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("n", [1, 2])
def test_reference_is_the_product_of_matrices(n):
    """S_T = Σ over writes of the product of all later transition matrices, built explicitly for each head."""
    T = 5
    inputs = make_inputs(1, T, n=n)
    o, state = run(inputs, backend="reference", scale=0.7)
    q, k, v, beta, g, S0 = inputs
    for head in range(H):
        transitions, writes = [], [S0[0, head]]
        for t in range(T):
            for j in range(n):
                key = k[0, t, j, head]
                householder = torch.eye(K, dtype=torch.float64) - beta[0, t, j, head] * torch.outer(key, key)
                transitions.append(householder * g[0, t, head].exp() if j == 0 else householder)
                writes.append(beta[0, t, j, head] * torch.outer(key, v[0, t, j, head]))
            S = torch.zeros(K, V, dtype=torch.float64)
            for i, write in enumerate(writes):
                S = S + functools.reduce(lambda later, m: m @ later, transitions[i:], write)
            torch.testing.assert_close(o[0, t, head], 0.7 * q[0, t, head] @ S, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state[0, head], S, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("gate", [None, "mild", "strong"])
@pytest.mark.parametrize("T, chunk_size", [(1, 64), (5, 64), (5, 4), (67, 64), (67, 16), (6, 1)])
def test_chunked_equals_reference(T, chunk_size, gate, n):
    assert_equal_to_reference(make_inputs(2, T, n=n, gate=gate), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("gate", [None, "mild"])
@pytest.mark.parametrize("n", [1, 3])
def test_chunked_equals_reference_on_documents(n, gate, chunk_size):
    inputs = make_inputs(1, sum(DOCUMENTS), n=n, gate=gate, num_states=len(DOCUMENTS))
    assert_equal_to_reference(inputs, cu_seqlens=bounds_of(DOCUMENTS), chunk_size=chunk_size)


def reflections_of_few_keys(T, n, dtype):
    """β = 2, no gate, keys that repeat: the transitions are reflections of a few directions, nothing ever fades."""
    q, k, v, beta, _, S0 = make_inputs(1, T, n=n, gate=None, dtype=dtype)
    with torch.no_grad():
        k[:, 1:] = k[:, :1]
        k[:, ::3] = k[:, ::3].flip(2)
        beta.fill_(2.0)
    return [q, k, v, beta, None, S0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_repeated_keys_with_beta_two(n):
    assert_equal_to_reference(reflections_of_few_keys(67, n, torch.float64))


@pytest.mark.parametrize("n", [1, 2])
def test_repeated_keys_with_beta_two_stay_exact_in_float32(n):
    """A truncated series for the triangular inverse fails here: the powers of A reach 1e30."""
    inputs = reflections_of_few_keys(128, n, torch.float32)
    doubles = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    exact = forward_and_gradients(doubles, backend="reference")
    for got, expected in zip(forward_and_gradients(inputs), exact):
        assert (got - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("n", [1, 2])
def test_l2_norm_of_queries_and_keys(n):
    q, k, v, beta, g, S0 = make_inputs(2, 13, n=n)
    with torch.no_grad():
        k.mul_(3.0)
        k[0, 4] = 0.0  # a zero key stays zero, with a finite gradient
    assert_equal_to_reference([q, k, v, beta, g, S0], qk_l2norm=True, chunk_size=8)
    unit = [t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k)]
    torch.testing.assert_close(
        run([q, k, v, beta, g, S0], qk_l2norm=True, backend="reference"),
        run([*unit, v, beta, g, S0], backend="reference"),
    )


def test_scale_defaults_to_inverse_root_of_key_size():
    inputs = make_inputs(1, 5)
    for backend in ("reference", "chunked"):
        default, given = (run(inputs, scale=s, backend=backend)[0] for s in (None, 1.0))
        torch.testing.assert_close(default, given * K**-0.5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_equal_separate_sequences(backend):
    inputs = make_inputs(1, sum(DOCUMENTS), n=2, num_states=len(DOCUMENTS))
    o, states = run(inputs, cu_seqlens=bounds_of(DOCUMENTS), backend=backend, chunk_size=8)
    bounds = bounds_of(DOCUMENTS).tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows = [t[:, start:end] for t in inputs[:-1]]
        alone, state = run([*rows, inputs[-1][i : i + 1]], backend=backend, chunk_size=8)
        torch.testing.assert_close(o[:, start:end], alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(states[i : i + 1], state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 16, 19])
def test_handing_over_the_state_equals_one_call(cut):
    *tensors, S0 = make_inputs(2, 20, n=2)
    o, state = run([*tensors, S0], chunk_size=16)
    o1, S = run([*(t[:, :cut] for t in tensors), S0], chunk_size=16)
    o2, S = run([*(t[:, cut:] for t in tensors), S], chunk_size=16)
    torch.testing.assert_close(torch.cat([o1, o2], 1), o, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(S, state, rtol=1e-10, atol=1e-10)


def test_no_initial_state_is_zeros():
    inputs = make_inputs(2, 9)
    zeros = [*inputs[:-1], torch.zeros_like(inputs[-1])]
    for backend in ("reference", "chunked"):
        torch.testing.assert_close(run([*inputs[:-1], None], backend=backend), run(zeros, backend=backend))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_is_near_float64(dtype, tolerance, autocast):
    """Inputs are rounded first, so what is left is float32 arithmetic and, for bfloat16, rounding of the output."""
    inputs = [t.detach().to(dtype) for t in make_inputs(2, 67, n=2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        o, state = run(inputs, backend="chunked", qk_l2norm=True)
    exact_o, exact_state = run([t.double() for t in inputs], backend="reference", qk_l2norm=True)
    assert o.dtype == dtype and state.dtype == torch.float32
    assert (o - exact_o).norm() < tolerance * exact_o.norm()
    assert (state - exact_state).norm() < 1e-5 * exact_state.norm()


def test_strong_gate_in_float32_has_finite_gradients():
    inputs = make_inputs(2, 70, n=2, gate="strong", dtype=torch.float32)
    with torch.no_grad():
        inputs[4].mul_(1e3)
    assert all(torch.isfinite(t).all() for t in forward_and_gradients(inputs, backend="chunked"))


def test_compiles_without_graph_breaks():
    *tensors, S0 = make_inputs(2, 20, n=2)
    compiled = torch.compile(functools.partial(gated_delta, chunk_size=8), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors, initial_state=S0), gated_delta(*tensors, initial_state=S0))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("q", (2, 6, H)),
        ("q", (2, 0, H, K)),
        ("k", (2, 6, H, K)),
        ("k", (2, 6, 2, H, K + 1)),
        ("v", (2, 6, H, V)),
        ("v", (2, 6, 1, H, V)),
        ("beta", (2, 6, H)),
        ("g", (2, 6, 2, H)),
        ("initial_state", (2, H, V, K)),
    ],
)
def test_bad_shapes(name, shape):
    names = ["q", "k", "v", "beta", "g", "initial_state"]
    arguments = dict(zip(names, make_inputs(2, 6, n=2)))
    arguments[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"gated_delta: {name} must have shape \("):
        gated_delta(**arguments)


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
