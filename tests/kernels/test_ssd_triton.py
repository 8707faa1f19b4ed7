"""ssd in Triton, run by its interpreter, against the step loop in float64; and compiled without a GPU."""

from pathlib import Path

import pytest
import torch
from compiling import SHARED_LIMIT, SHARED_LIMIT_OF_AMPERE, compile_for_ampere, compile_for_hopper

from riverrun.kernels.ssd import ssd, triton_op
from riverrun.kernels.ssd.reference import ssd_reference
from riverrun.kernels.ssd.triton_op import Launch, ssd_triton

DOCUMENTS = [1, 9, 1, 1, 17, 4]


@pytest.fixture
def chunk(monkeypatch):
    """Sets the tokens of a chunk in float32, for short sequences of several."""
    return lambda size: monkeypatch.setattr(triton_op, "CHUNK", 2 * size)


def make_inputs(B, T, H=4, G=2, P=3, N=5, D="H", S=None, dt_scale=0.3, dtype=torch.float32):
    """x, dt, A, B, C, D, initial_state."""
    x, b, c = torch.randn(B, T, H, P), torch.randn(B, T, G, N), torch.randn(B, T, G, N)
    dt, A = torch.randn(B, T, H).exp() * dt_scale, -torch.randn(H).exp()
    skip = {None: None, "H": torch.randn(H), "HP": torch.randn(H, P)}[D]
    return [x.to(dtype), dt, A, b.to(dtype), c.to(dtype), skip, torch.randn(S or B, H, P, N)]


def run(function, inputs, dtype=None, cu_seqlens=None):
    """y, final state, and the gradients."""
    leaves = [None if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in inputs]
    outputs = function(*leaves, cu_seqlens)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], upstream)]


def errors(inputs, cu_seqlens=None):
    want = run(ssd_reference, inputs, torch.float64, cu_seqlens)
    got = run(ssd_triton, inputs, None, cu_seqlens)
    return [((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want)]


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("T", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("D", [None, "H", "HP"])
def test_equals_reference(T, D, chunk):
    chunk(16)
    assert max(errors(make_inputs(2, T, D=D))) < 1e-5


@pytest.mark.parametrize("H, G", [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (6, 2)])
def test_groups(H, G, chunk):
    chunk(16)
    assert max(errors(make_inputs(1, 20, H, G))) < 1e-5


@pytest.mark.parametrize("P, N", [(16, 16), (33, 20), (70, 17)])
@pytest.mark.parametrize("D", ["H", "HP"])
def test_head_sizes(P, N, D, chunk):
    """Tiles that fit, and tiles that are padded; heads of more than one tile."""
    chunk(32)
    assert max(errors(make_inputs(1, 40, 2, 1, P, N, D))) < 1e-5


def test_equals_reference_in_chunks_of_64(chunk):
    chunk(64)
    assert max(errors(make_inputs(1, 70))) < 1e-5


@pytest.mark.parametrize("lengths", [DOCUMENTS, [16, 1, 16], [33]])
def test_documents(lengths, chunk):
    chunk(16)
    assert max(errors(make_inputs(1, sum(lengths), S=len(lengths)), bounds_of(lengths))) < 1e-5


def test_programs_of_whole_heads_and_of_several(chunk):
    """Where there are enough programs: walks of all channels of a head, gradients of more than one head."""
    chunk(16)
    lengths = [1, 2] * 16 + [1]
    inputs, bounds = make_inputs(1, sum(lengths), 4, 1, P=20, S=len(lengths)), bounds_of(lengths)
    launch = Launch.of(inputs[0], inputs[3], bounds)
    assert (launch.walk(), launch.splits) == ((132, 32), 2)
    assert max(errors(inputs, bounds)) < 1e-5


@pytest.mark.parametrize("dt_scale", [1e-6, 30.0])
def test_extreme_decay(dt_scale, chunk):
    chunk(16)
    assert max(errors(make_inputs(1, 40, dt_scale=dt_scale))) < 1e-5


def test_decay_that_underflows_within_a_token(chunk):
    chunk(16)
    assert all(torch.isfinite(t).all() for t in run(ssd_triton, make_inputs(1, 40, dt_scale=1e4)))


def test_narrow_types(chunk):
    chunk(16)
    assert max(errors(make_inputs(1, 40, dtype=torch.bfloat16))) < 2e-2
    assert max(errors(make_inputs(1, 40, dtype=torch.float16))) < 2e-3


def test_views_of_one_tensor(chunk):
    """As they come out of a projection: x, B and C side by side for each token."""
    chunk(16)
    H, G, P, N = 4, 2, 3, 5
    _, dt, A, *_ = make_inputs(2, 20)
    together = torch.randn(2, 20, H * P + 2 * G * N, requires_grad=True)
    x, B, C = together.split([H * P, G * N, G * N], dim=2)
    x, B, C = x.unflatten(2, (H, P)), B.unflatten(2, (G, N)), C.unflatten(2, (G, N))
    outcomes = []
    for views in ((x, B, C), (x.contiguous(), B.contiguous(), C.contiguous())):
        y, _ = ssd_triton(views[0], dt, A, *views[1:], None, None, None)
        outcomes.append((y, torch.autograd.grad(y.square().sum(), together)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_only_what_is_asked_for(chunk):
    """A loss of y alone, or of the final state alone; no initial state, no skip connection."""
    chunk(16)
    inputs = make_inputs(1, 20)[:5]
    for which in (0, 1):
        grads = []
        for function, dtype in ((ssd_triton, torch.float32), (ssd_reference, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            loss = function(*leaves, None, None, None)[which].square().sum()
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for got, want in zip(*grads):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_traces_without_graph_breaks(chunk):
    chunk(16)
    inputs = make_inputs(1, 20)
    compiled = torch.compile(ssd_triton, backend="aot_eager", fullgraph=True)
    for got, want in zip(run(compiled, inputs), run(ssd_triton, inputs)):
        torch.testing.assert_close(got, want)


def test_user_errors():
    with pytest.raises(ValueError, match="take P up to 128 and N up to 256, got P=3, N=300"):
        ssd_triton(*make_inputs(1, 4, N=300), None)
    with pytest.raises(ValueError, match="expected batch size 1, got 2"):
        ssd_triton(*make_inputs(2, 4), torch.tensor([0, 4]))


LAUNCHES = Path(__file__).with_name("launches_ssd.py")


def test_compiles_for_hopper():
    kernels = compile_for_hopper(LAUNCHES)
    assert {k["kernel"] for k in kernels} == {"forward_kernel", "states_kernel", "gradients_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT, kernel
        if kernel["launch"] == "launch_mamba2":
            assert kernel["wgmma"] > 0, kernel
            assert kernel["shared"] <= SHARED_LIMIT // 2, f"one program a multiprocessor: {kernel}"
        if kernel["launch"] not in ("launch_wide", "launch_single_precision"):
            most = {"forward_kernel": 128, "states_kernel": 64, "gradients_kernel": 384}[kernel["kernel"]]
            assert kernel["stack"] <= most, f"spills: {kernel}"


def test_compiles_for_ampere():
    for kernel in compile_for_ampere(LAUNCHES):
        assert kernel["shared"] <= SHARED_LIMIT_OF_AMPERE, kernel
        if kernel["launch"] not in ("launch_wide", "launch_single_precision"):
            most = {"forward_kernel": 128, "states_kernel": 64, "gradients_kernel": 192}[kernel["kernel"]]
            assert kernel["stack"] <= most, f"spills: {kernel}"


def test_through_the_public_function(chunk):
    chunk(16)
    *tensors, state = make_inputs(1, 20)
    got, want = (ssd(*tensors, initial_state=state, backend=backend) for backend in ("triton", "chunked"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
