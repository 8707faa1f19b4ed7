"""causal_conv1d against F.conv1d of each sequence by itself, in float64."""

import functools
import itertools

import pytest
import torch
from torch.nn import functional as F

from riverrun.kernels.causal_conv1d import causal_conv1d

D = 5
DOCUMENTS = [1, 9, 2, 1, 17, 3]  # most are shorter than the kernel
BACKENDS = ("reference", "chunked")


def make_inputs(B, T, W=4, num_states=None, dtype=torch.float64):
    """x, weight, bias, initial_state, all leaves."""
    randn = functools.partial(torch.randn, dtype=dtype)
    inputs = [randn(B, T, D), randn(D, W), randn(D), randn(num_states or B, W - 1, D)]
    return [t.requires_grad_() for t in inputs]


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def expected(x, weight, bias, state, lengths=None, activation=None):
    """torch's convolution, one sequence at a time, over the initial state followed by the sequence."""
    ys, states = [], []
    sequences = x[0].split(lengths) if lengths else x.unbind(0)
    for sequence, before in zip(sequences, state):
        row = torch.cat([before, sequence])
        ys.append(F.conv1d(row.T, weight[:, None], bias, groups=D).T)
        states.append(row[len(sequence) :])
    y = torch.cat(ys)[None] if lengths else torch.stack(ys)
    return F.silu(y) if activation == "silu" else y, torch.stack(states)


def with_gradients(y, state, inputs):
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in (y, state))
    return [y, state, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("T", [1, 2, 7, 67])
@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_equal_torch(backend, W, T, activation):
    x, weight, bias, state = inputs = make_inputs(3, T, W)
    got = causal_conv1d(x, weight, bias, activation=activation, initial_state=state, backend=backend)
    want = expected(*inputs, activation=activation)
    torch.testing.assert_close(with_gradients(*got, inputs), with_gradients(*want, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("W", [2, 4, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_equal_torch(backend, W, activation):
    x, weight, bias, state = inputs = make_inputs(1, sum(DOCUMENTS), W, num_states=len(DOCUMENTS))
    options = {"activation": activation, "cu_seqlens": bounds_of(DOCUMENTS), "backend": backend}
    got = causal_conv1d(x, weight, bias, initial_state=state, **options)
    want = expected(*inputs, lengths=DOCUMENTS, activation=activation)
    torch.testing.assert_close(with_gradients(*got, inputs), with_gradients(*want, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_state_and_no_bias_are_zeros(backend, packed):
    x, weight, bias, state = make_inputs(1, sum(DOCUMENTS), num_states=len(DOCUMENTS) if packed else 1)
    options = {"cu_seqlens": bounds_of(DOCUMENTS) if packed else None, "backend": backend}
    got = causal_conv1d(x, weight, **options)
    want = causal_conv1d(x, weight, bias * 0, initial_state=state * 0, **options)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("W", [1, 4])
def test_a_kernel_of_one_tap_and_a_single_step(W):
    x, weight, bias, state = inputs = make_inputs(2, 1, W)
    got = causal_conv1d(x, weight, bias, initial_state=state)  # "auto" takes the step loop
    torch.testing.assert_close(got, expected(*inputs))
    torch.testing.assert_close(causal_conv1d(x, weight, bias, initial_state=state, backend="chunked"), got)


@pytest.mark.parametrize("cut", [1, 2, 8])
def test_two_calls_equal_one(cut):
    x, weight, bias, state = make_inputs(2, 11)
    y, final = causal_conv1d(x, weight, bias, initial_state=state)
    y1, between = causal_conv1d(x[:, :cut], weight, bias, initial_state=state)
    y2, last = causal_conv1d(x[:, cut:], weight, bias, initial_state=between)
    torch.testing.assert_close((torch.cat([y1, y2], 1), last), (y, final))


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    x, weight, bias, state = make_inputs(1, 7, 3, num_states=3 if packed else 1)
    cu_seqlens = bounds_of([1, 4, 2]) if packed else None

    def run(x, weight, bias, state):
        options = {"activation": "silu", "cu_seqlens": cu_seqlens, "backend": "chunked"}
        return causal_conv1d(x, weight, bias, initial_state=state, **options)

    assert torch.autograd.gradcheck(run, (x, weight, bias, state))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_low_precision_rounds_once(dtype, tolerance, autocast):
    x, weight, bias, state = make_inputs(2, 67)
    rounded = [x.detach().to(dtype), *(t.detach().float() for t in (weight, bias)), state.detach().to(dtype)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, final = causal_conv1d(*rounded[:3], activation="silu", initial_state=rounded[3])
    exact, exact_final = expected(*(t.double() for t in rounded), activation="silu")
    assert y.dtype == final.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance / 10)
    torch.testing.assert_close(final.double(), exact_final, rtol=0, atol=0)


def test_documents_are_separate_sequences():
    """Changing one document changes no other one."""
    x, weight, bias, _ = make_inputs(1, sum(DOCUMENTS))
    cu_seqlens = bounds_of(DOCUMENTS)
    y, state = causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)
    for s, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        other = x.detach().clone()
        other[:, start:end] += 1
        y2, state2 = causal_conv1d(other, weight, bias, cu_seqlens=cu_seqlens)
        same = (y2 == y).all(-1)[0]
        assert same[:start].all() and same[end:].all() and not same[start:end].any()
        assert [i for i in range(len(DOCUMENTS)) if not torch.equal(state2[i], state[i])] == [s]


def test_compiles_without_graph_breaks():
    inputs = make_inputs(2, 9)

    def run(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, activation="silu", initial_state=state, backend="chunked")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = with_gradients(*compiled(*inputs), inputs)
    torch.testing.assert_close(got, with_gradients(*run(*inputs), inputs))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x", (2, D)),
        ("x", (2, 0, D)),
        ("weight", (D,)),
        ("weight", (D + 1, 4)),
        ("bias", (1,)),
        ("initial_state", (2, 4, D)),
    ],
)
def test_bad_shapes(name, shape):
    arguments = dict(zip(["x", "weight", "bias", "initial_state"], make_inputs(2, 6)))
    arguments[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"causal_conv1d: {name} must have shape"):
        causal_conv1d(**arguments)


def test_bad_options():
    x, weight, *_ = make_inputs(2, 6)
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(ValueError, match="backend"):
        causal_conv1d(x, weight, backend="fast")
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="one row"):
            causal_conv1d(x, weight, cu_seqlens=bounds_of([2, 4]), backend=backend)
        with pytest.raises(ValueError, match="rise strictly"):
            causal_conv1d(x[:1], weight, cu_seqlens=bounds_of([2, 3]), backend=backend)
