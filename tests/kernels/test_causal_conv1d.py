"""causal_conv1d against F.conv1d of each sequence by itself, in float64; the Triton kernels, run by Triton's
interpreter, in float32 and narrower types, and compiled for Hopper and Ampere."""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
import torch
from compiling import CARDS
from torch.nn import functional as F

from riverrun.kernels.causal_conv1d import causal_conv1d

D = 5
DOCUMENTS = [1, 9, 2, 1, 17, 3]  # most are shorter than the kernel
BACKENDS = ("reference", "chunked")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels


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
@pytest.mark.parametrize("W", [1, 2, 4, 6])
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


def run_triton(inputs, lengths=None, activation=None, use_state=True, use_final=True, dtype=torch.float32):
    """y, final state and gradients by the Triton kernels, and by torch in float64."""
    results = []
    for backend, kind, device in (("triton", dtype, DEVICE), ("expected", torch.float64, "cpu")):
        # parameters and upstream gradients stay exact enough; only the inputs are rounded
        leaves = [t.detach().to(dtype if i in (0, 3) else torch.float32) for i, t in enumerate(inputs)]
        leaves = [t.to(device, torch.float64 if kind == torch.float64 else None).requires_grad_() for t in leaves]
        x, weight, bias, state = leaves
        if not use_state:
            leaves, state = leaves[:3], None if backend == "triton" else torch.zeros_like(state)
        if backend == "triton":
            options = {"activation": activation, "cu_seqlens": bounds_of(lengths).to(device) if lengths else None}
            y, final = causal_conv1d(x, weight, bias, initial_state=state, backend=backend, **options)
        else:
            y, final = expected(x, weight, bias, state, lengths, activation)
        outputs = [y, final] if use_final else [y]
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(t.shape, generator=generator).to(dtype).to(t) for t in outputs]
        results.append([y, final, *torch.autograd.grad(outputs, leaves, upstream)])
    return results


def assert_triton_equals(got, want, tolerance=1e-5):
    for a, b in zip(got, want):
        assert a.shape == b.shape
        assert (a.cpu() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("T", [1, 2, 35])
@pytest.mark.parametrize("W", [1, 2, 4, 8])
def test_triton_rows_equal_torch(W, T, activation):
    assert_triton_equals(*run_triton(make_inputs(2, T, W), activation=activation))


@pytest.mark.parametrize("use_state, use_final", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("W", [2, 4, 8])
def test_triton_documents_equal_torch(W, use_state, use_final):
    inputs = make_inputs(1, sum(DOCUMENTS), W, num_states=len(DOCUMENTS))
    assert_triton_equals(*run_triton(inputs, DOCUMENTS, "silu", use_state, use_final))


def test_triton_documents_start_anywhere():
    """Also where a lane starts or ends, and within the tokens that it reads of its neighbours."""
    inputs = make_inputs(1, 36, num_states=2)
    for bound in (1, 3, 12, 13, 14, 16, 17, 19, 26, 32, 35):
        assert_triton_equals(*run_triton(inputs, [bound, 36 - bound], "silu"))


def test_triton_blocks_of_channels(monkeypatch):
    from riverrun.kernels.causal_conv1d import triton_op

    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(triton_op, name, dataclasses.replace(getattr(triton_op, name), channels=4))
    inputs = make_inputs(1, sum(DOCUMENTS), num_states=len(DOCUMENTS))
    assert_triton_equals(*run_triton(inputs, DOCUMENTS, "silu"))


def test_triton_many_documents_of_one_token():
    lengths = [1] * 37
    assert_triton_equals(*run_triton(make_inputs(1, 37, num_states=37), lengths, "silu"))


def test_triton_one_document_is_a_row():
    """To the bit: the kernels step through documents as through rows."""
    inputs = make_inputs(1, 61)
    torch.testing.assert_close(run_triton(inputs, [61], "silu")[0], run_triton(inputs, None, "silu")[0], rtol=0, atol=0)


def test_triton_long_lanes(monkeypatch):
    """Most groups lie inside a document; bounds lie in every place of a group, and of what a lane reads of the next."""
    from riverrun.kernels.causal_conv1d import triton_op

    monkeypatch.setattr(triton_op, "SHORTEST", 64)
    lengths = [30, 1, 22, 5, 41, 2, 2, 33, 4, 20]
    inputs = make_inputs(1, sum(lengths), num_states=len(lengths))
    assert_triton_equals(*run_triton(inputs, lengths, "silu"))


def test_document_positions():
    from riverrun.kernels.common.triton_documents import document_positions

    lengths = [1, 130, 2, 1, 1, 300]
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    before = torch.cat([torch.arange(n) for n in lengths])
    left = torch.cat([torch.arange(n, 0, -1) for n in lengths])
    got = document_positions(bounds_of(lengths).to(DEVICE), sum(lengths))
    assert got.tolist() == torch.stack([document, before, left]).tolist()


# Triton's interpreter cuts off the digits beyond bfloat16, a GPU rounds
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-3), (torch.float16, 5e-4)])
def test_triton_narrow_types_round_once(dtype, tolerance):
    inputs = make_inputs(2, 40)
    got, want = run_triton(inputs, activation="silu", dtype=dtype)
    assert [t.dtype for t in got] == [dtype] * 3 + [torch.float32] * 2 + [dtype]
    assert_triton_equals(got, want, tolerance)


@pytest.mark.parametrize("view", [lambda x: x[..., 2 : 2 + D], lambda x: x[..., ::2], lambda x: x.transpose(0, 1)])
def test_triton_takes_views(view):
    """A slice of a projection's output is read where it lies, other views are copied."""
    weight = torch.randn(D, 4, device=DEVICE)
    projected = torch.randn(3, 20, 2 * D - 1 if view(torch.empty(1, 1, 9)).shape[2] == D else D, device=DEVICE)
    projected.requires_grad_()
    assert not view(projected).is_contiguous()
    results = []
    for x in (view(projected), view(projected).contiguous()):
        y, final = causal_conv1d(x, weight, backend="triton")
        upstream = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)
        strided = upstream.transpose(1, 2).contiguous().transpose(1, 2)
        results.append([y, final, *torch.autograd.grad(y, projected, strided)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_triton_reads_slices_in_place():
    from riverrun.kernels.causal_conv1d.triton_op import _rows

    projected = torch.zeros(3, 20, 2 * D)
    assert _rows(projected[..., D:]).data_ptr() == projected[..., D:].data_ptr()
    assert _rows(projected[:, :1, :D]).data_ptr() == projected.data_ptr()  # a decoding step


def test_triton_steps_equal_one_call():
    x, weight, bias, state = (t.detach().float().to(DEVICE) for t in make_inputs(2, 7))
    whole = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, backend="triton")
    ys = []
    for x_t in x.split(1, dim=1):
        y, state = causal_conv1d(x_t, weight, bias, activation="silu", initial_state=state, backend="triton")
        ys.append(y)
    torch.testing.assert_close((torch.cat(ys, 1), state), whole)


@pytest.mark.parametrize("packed", [False, True])
def test_triton_compiles_without_graph_breaks(packed):
    from riverrun.kernels.causal_conv1d.triton_op import causal_conv1d_triton

    inputs = [t.detach().float().to(DEVICE).requires_grad_() for t in make_inputs(1, 9, num_states=2 if packed else 1)]
    cu_seqlens = bounds_of([4, 5]).to(DEVICE) if packed else None

    def run(x, weight, bias, state):
        return causal_conv1d_triton(x, weight, bias, True, state, cu_seqlens)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = with_gradients(*(t.cpu() for t in compiled(*inputs)), inputs)
    torch.testing.assert_close(got, with_gradients(*(t.cpu() for t in run(*inputs)), inputs), rtol=0, atol=0)


def test_triton_bad_options():
    x, weight, *_ = (t.detach().float().to(DEVICE) for t in make_inputs(2, 6))
    with pytest.raises(ValueError, match="one row"):
        causal_conv1d(x, weight, cu_seqlens=bounds_of([2, 4]), backend="triton")
    with pytest.raises(ValueError, match="use backend='chunked' for float64"):
        causal_conv1d(x.double(), weight, backend="triton")
    with pytest.raises(ValueError, match="up to 8 taps"):
        causal_conv1d(x, torch.zeros(D, 9, device=DEVICE), backend="triton")


@pytest.mark.parametrize("card", CARDS)
def test_compiles_for(card):
    """The kernels of gated_rms_norm and linear_cross_entropy as well."""
    compile_kernels, shared_limit = CARDS[card]
    kernels = compile_kernels(Path(__file__).with_name("launches_layer.py"))
    names = {"forward_kernel", "backward_kernel", "initial_gradient_kernel", "_positions_kernel"}
    names |= {"log_z_kernel", "gradient_kernel"}
    assert {k["kernel"] for k in kernels} == names
    for kernel in kernels:
        assert kernel["shared"] <= shared_limit, kernel
        widest = kernel["launch"] == "launch_norm_of_the_most_channels"
        assert kernel["stack"] <= (1024 if widest else 0), f"spills: {kernel}"
        # as many programs a multiprocessor for documents as for rows
        if "convolution" in kernel["launch"] and kernel["kernel"] == "backward_kernel":
            one_step, eight_taps = (part in kernel["launch"] for part in ("one_step", "eight_taps"))
            assert one_step or kernel["registers"] <= (255 if eight_taps else 128), kernel
        # none at every step, but where the channels are too few to be loaded as vectors
        assert kernel["converts"] <= 5, kernel
