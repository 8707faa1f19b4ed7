"""ssd in Triton, run by its interpreter, against the step loop in float64; and compiled without a GPU."""

from pathlib import Path

import pytest
import torch
from compiling import SHARED_LIMIT, SHARED_LIMIT_OF_AMPERE, compile_for_ampere, compile_for_hopper

from riverrun.kernels.common import triton_segments
from riverrun.kernels.ssd import ssd, triton_launch, triton_op, triton_step_sizes, triton_walks
from riverrun.kernels.ssd.triton_launch import Launch

DOCUMENTS = [1, 9, 1, 1, 17, 4]


@pytest.fixture
def chunk(monkeypatch):
    """Sets the tokens of a chunk in float32, for short sequences of several."""
    return lambda size: monkeypatch.setattr(triton_launch, "CHUNK", 2 * size)


def make_inputs(B, T, H=4, G=2, P=3, N=5, D="H", S=None, dt_scale=0.3, dtype=torch.float32, raw=False):
    """x, dt, A, B, C, D, dt_bias, initial_state; `raw` step sizes are for a bias and a softplus."""
    x, b, c = torch.randn(B, T, H, P), torch.randn(B, T, G, N), torch.randn(B, T, G, N)
    dt, A = torch.randn(B, T, H), -torch.randn(H).exp()
    dt, bias = (2 * dt, torch.randn(H)) if raw else (dt.exp() * dt_scale, None)
    skip = {None: None, "H": torch.randn(H), "HP": torch.randn(H, P)}[D]
    x, b, c = x.to(dtype), b.to(dtype), c.to(dtype)
    return [x, dt.to(dtype) if raw else dt, A, b, c, skip, bias, torch.randn(S or B, H, P, N)]


def run(backend, inputs, dtype=None, cu_seqlens=None):
    """y, final state, and the gradients."""
    leaves = [None if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in inputs]
    *tensors, bias, state = leaves
    steps = {"dt_bias": bias, "dt_softplus": bias is not None}
    outputs = ssd(*tensors, **steps, initial_state=state, cu_seqlens=cu_seqlens, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], upstream)]


def errors(inputs, cu_seqlens=None):
    want = run("reference", inputs, torch.float64, cu_seqlens)
    got = run("triton", inputs, None, cu_seqlens)
    assert all(t.dtype == leaf.dtype for t, leaf in zip(got[2:], (t for t in inputs if t is not None)))
    return [((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want)]


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("T", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("D", [None, "H", "HP"])
def test_equals_reference(T, D, chunk):
    chunk(16)
    assert max(errors(make_inputs(2, T, D=D))) < 1e-5


@pytest.mark.parametrize("T", [1, 17, 40])
def test_bias_and_softplus(T, chunk):
    chunk(16)
    assert max(errors(make_inputs(2, T, raw=True))) < 1e-5
    assert max(errors(make_inputs(2, T, raw=True, dtype=torch.float16))) < 1e-2


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's; σ is 1 / ∞ there
def test_softplus_from_next_to_nothing_to_its_argument(chunk):
    """To a relative 1e-5: the final state of one token is Δ x B, and Δ' = σ."""
    chunk(16)
    raw = torch.cat([torch.linspace(-60, 60, 49), torch.tensor([-1e4, 1e4])])
    dt = raw.view(1, 1, -1).requires_grad_()
    H = len(raw)
    _, state = ssd(
        torch.ones(1, 1, H, 1), dt, -torch.ones(H), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1),
        dt_softplus=True, backend="triton",
    )  # fmt: skip
    (slope,) = torch.autograd.grad(state.sum(), dt)
    exact = raw.double()
    torch.testing.assert_close(state.flatten().double(), torch.logaddexp(exact, 0 * exact), rtol=1e-5, atol=1e-37)
    torch.testing.assert_close(slope.flatten().double(), exact.sigmoid(), rtol=1e-5, atol=1e-37)


def test_bias_without_softplus(chunk):
    chunk(16)
    *tensors, _, state = make_inputs(1, 20)
    outcomes = []
    for backend in ("triton", "reference"):
        bias = torch.full((4,), 0.5, requires_grad=True)
        y, _ = ssd(*tensors, dt_bias=bias, initial_state=state, backend=backend)
        outcomes.append((y, *torch.autograd.grad(y.sum(), bias)))
    for got, want in zip(*outcomes):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


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
    assert (launch.walks, launch.walkers, launch.splits) == (132, 32, 2)
    assert max(errors(inputs, bounds)) < 1e-5


@pytest.mark.parametrize(
    "B, lengths, D, raw",
    [(1, [150], "H", True), (2, None, None, True), (1, [1, 1, 68, 1, 79], "H", False), (1, [32, 64, 54], "HP", True)],
)
def test_segments(B, lengths, D, raw, chunk, monkeypatch):
    """Walked side by side where sequences are few: several segments a sequence, of several chunks."""
    chunk(16)
    S = len(lengths or [0] * B)
    monkeypatch.setattr(triton_segments, "LEAST_CHUNKS", 2)
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda _: 8 * S)
    inputs, bounds = make_inputs(B, 150, 2, 1, D=D, S=S, raw=raw), None if lengths is None else bounds_of(lengths)
    segments = Launch.of(inputs[0], inputs[3], bounds).segments
    starts = segments.chunks.tensors[0]
    assert segments.inner_end.sum() >= 2 and (starts.diff() > 16).any()
    assert max(errors(inputs, bounds)) < 1e-5


def test_segments_without_an_initial_state(chunk, monkeypatch):
    chunk(16)
    monkeypatch.setattr(triton_segments, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda _: 8)
    inputs = [*make_inputs(1, 80, 2, 1)[:-1], None]
    assert Launch.of(inputs[0], inputs[3], None).segments is not None
    assert max(errors(inputs)) < 1e-5


def test_strong_decay_in_segments(chunk, monkeypatch):
    """What one segment leaves to the next may underflow."""
    chunk(16)
    monkeypatch.setattr(triton_segments, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda _: 8)
    for dt_scale in (1e-6, 30.0):
        inputs = make_inputs(1, 80, 2, 1, dt_scale=dt_scale)
        assert Launch.of(inputs[0], inputs[3], None).segments is not None
        assert max(errors(inputs)) < 1e-5


def test_no_segments_where_walks_fill_the_device():
    def segments(B, T, H, documents=None):
        x, b = (torch.empty(B, T, J, K, dtype=torch.bfloat16, device="meta") for J, K in ((H, 64), (1, 128)))
        return triton_launch.Launch.of(x, b, documents).segments

    assert segments(8, 4096, 64) is segments(2, 65536, 64) is segments(64, 1, 64) is segments(1, 2048, 8) is None
    assert segments(1, 32768, 24).chunks.num_sequences == 11  # 264 programs side by side


def test_decodes_in_two_launches(monkeypatch):
    """A token of each of 64 sequences: the steps and the walk, and no other operation that a device would see."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(grid)

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view and "empty" not in function.name():
                seen.append(function.name())
            return function(*args, **(kwargs or {}))

    x, dt, A, b, c, D, bias, state = make_inputs(64, 1, raw=True)
    monkeypatch.setattr(triton_step_sizes, "steps_kernel", Kernel())
    monkeypatch.setattr(triton_walks, "forward_kernel", Kernel())
    with Operations():
        triton_op.scan(x, dt, A, b, c, D, bias, state, None, True)
    assert seen == [(64, 1), (64 * 4,)]


def test_decoding_equals_reference():
    assert max(errors(make_inputs(64, 1, 1, 1, raw=True))) < 1e-5


@pytest.mark.parametrize("dt_scale", [1e-6, 30.0])
def test_extreme_decay(dt_scale, chunk):
    chunk(16)
    assert max(errors(make_inputs(1, 40, dt_scale=dt_scale))) < 1e-5


def test_decay_that_underflows_within_a_token(chunk):
    chunk(16)
    assert all(torch.isfinite(t).all() for t in run("triton", make_inputs(1, 40, dt_scale=1e4)))


def test_narrow_types(chunk):
    chunk(16)
    assert max(errors(make_inputs(1, 40, dtype=torch.bfloat16))) < 2e-2
    assert max(errors(make_inputs(1, 40, dtype=torch.float16))) < 2e-3


def test_views_of_one_tensor(chunk):
    """As they come out of a projection: x, B, C and dt side by side for each token."""
    chunk(16)
    H, G, P, N = 4, 2, 3, 5
    A = -torch.randn(H).exp()
    together = torch.randn(2, 20, H * P + 2 * G * N + H, requires_grad=True)
    x, B, C, dt = together.split([H * P, G * N, G * N, H], dim=2)
    views = x.unflatten(2, (H, P)), dt, B.unflatten(2, (G, N)), C.unflatten(2, (G, N))
    outcomes = []
    for x, dt, B, C in (views, tuple(t.contiguous() for t in views)):
        y, _ = ssd(x, dt, A, B, C, dt_softplus=True, backend="triton")
        outcomes.append((y, torch.autograd.grad(y.square().sum(), together)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_only_what_is_asked_for(chunk):
    """A loss of y alone, or of the final state alone; no initial state, no skip connection."""
    chunk(16)
    inputs = make_inputs(1, 20)[:5]
    for which in (0, 1):
        grads = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            loss = ssd(*leaves, backend=backend)[which].square().sum()
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for got, want in zip(*grads):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_traces_without_graph_breaks(chunk):
    chunk(16)
    x, dt, A, B, C, D, bias, state = make_inputs(1, 20, raw=True)

    def scan(x, dt, bias, state):
        return triton_op.ssd_triton(x, dt, A, B, C, D, bias, True, state, None)

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    leaves = [t.requires_grad_() for t in (x, dt, bias, state)]
    outcomes = []
    for function in (compiled, scan):
        outputs = function(*leaves)
        outcomes.append([*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), leaves)])
    for got, want in zip(*outcomes):
        torch.testing.assert_close(got, want)


def test_user_errors():
    with pytest.raises(ValueError, match="take P up to 128 and N up to 256, got P=3, N=300"):
        run("triton", make_inputs(1, 4, N=300))
    with pytest.raises(ValueError, match="expected batch size 1, got 2"):
        run("triton", [*make_inputs(2, 4)[:-1], None], cu_seqlens=torch.tensor([0, 4]))


LAUNCHES = Path(__file__).with_name("launches_ssd.py")


def test_compiles_for_hopper():
    kernels = compile_for_hopper(LAUNCHES)
    assert {k["kernel"] for k in kernels} == {
        "steps_kernel", "forward_kernel", "states_kernel", "between_kernel", "gradients_kernel", "steps_backward_kernel"
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT, kernel
        if kernel["launch"] == "launch_mamba2":
            assert kernel["wgmma"] > 0 or "steps" in kernel["kernel"], kernel
            assert kernel["shared"] <= SHARED_LIMIT // 2, f"one program a multiprocessor: {kernel}"
        if kernel["launch"] not in ("launch_wide", "launch_single_precision"):
            most = {"forward_kernel": 160, "states_kernel": 64}
            assert kernel["stack"] <= most.get(kernel["kernel"], 0), f"spills: {kernel}"


def test_compiles_for_ampere():
    for kernel in compile_for_ampere(LAUNCHES):
        assert kernel["shared"] <= SHARED_LIMIT_OF_AMPERE, kernel
        if kernel["launch"] not in ("launch_wide", "launch_single_precision"):
            most = {"forward_kernel": 128, "states_kernel": 64, "gradients_kernel": 192}
            assert kernel["stack"] <= most.get(kernel["kernel"], 0), f"spills: {kernel}"


def test_through_the_public_function(chunk):
    chunk(16)
    *tensors, _, state = make_inputs(1, 20)
    got, want = (ssd(*tensors, initial_state=state, backend=backend) for backend in ("triton", "chunked"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
