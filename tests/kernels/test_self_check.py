"""Kernels check themselves once for each machine."""

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.kernels.causal_conv1d.triton_op import causal_conv1d_triton
from riverrun.kernels.common import self_check
from riverrun.kernels.common.self_check import check_once, deviation
from riverrun.kernels.common.shooting import take_statistics
from riverrun.kernels.diagonal_scan import diagonal_scan
from riverrun.kernels.gated_delta import gated_delta, triton_launch
from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.kernels.head_rnn import head_rnn
from riverrun.kernels.linear_cross_entropy import linear_cross_entropy
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm
from riverrun.kernels.ssd import ssd

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(self_check, "_agreed", set())


def test_agreement_is_remembered(monkeypatch, tmp_path):
    found = []
    for _ in range(2):
        check_once("op", {"K": 16}, CPU, lambda: found.append(1) or 1e-3, 1e-2)
    assert len(found) == 1
    monkeypatch.setattr(self_check, "_agreed", set())  # another process
    check_once("op", {"K": 16}, CPU, lambda: found.append(1) or 1e-3, 1e-2)
    assert len(found) == 1 and len(list(tmp_path.rglob("*.json"))) == 1
    check_once("op", {"K": 32}, CPU, lambda: found.append(1) or 1e-3, 1e-2)
    monkeypatch.setattr(self_check, "_agreed", set())
    monkeypatch.setattr(self_check, "_sources", lambda: "edited")
    check_once("op", {"K": 16}, CPU, lambda: found.append(1) or 1e-3, 1e-2)
    assert len(found) == 3


@pytest.mark.parametrize("bad", [0.5, float("nan")])
def test_disagreement_is_an_error_every_time(bad, tmp_path):
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"op with K=16: on this machine \(interpreter, Triton .* differ .*chunked"
        ):
            check_once("op", {"K": 16}, CPU, lambda: bad, 1e-2)
    assert not list(tmp_path.rglob("*.json"))


def test_deviation():
    a = torch.tensor([3.0, 4.0])
    assert deviation([a, a], [a, 1.01 * a]) == pytest.approx(0.01 / 1.01)
    nan = torch.tensor([float("nan")])
    assert not deviation([nan, a], [nan, a]) <= 1


D, T = 4, 10
BOUNDS = torch.tensor([0, 1, T], dtype=torch.int32)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def options(packed, *state):
    """Documents with initial states, or a row without."""
    return {"cu_seqlens": BOUNDS, "initial_state": leaf(*state)} if packed else {}


def conv(packed=False):
    x, weight, bias = leaf(1, T, D), leaf(D, 4), leaf(D)
    return causal_conv1d(x, weight, bias if packed else None, backend="triton", **options(packed, 2, 3, D))[0]


def norm(gated=True):
    x, gate, weight = leaf(1, T, 3, D), leaf(1, T, 3, D), leaf(D)
    return gated_rms_norm(x, gate if gated else None, weight, groups=2, backend="triton")


def scan(packed=False, use_complex=False):
    dtype = torch.complex64 if use_complex else torch.float32
    h = diagonal_scan(leaf(1, T, D, dtype=dtype), leaf(D, dtype=dtype), backend="triton", **options(packed, 2, D))[0]
    return torch.view_as_real(h) if use_complex else h


def loss(vocabulary=33):
    targets = torch.zeros(T, dtype=torch.long)
    return linear_cross_entropy(leaf(T, D), leaf(vocabulary, D), targets, backend="triton").loss


def options_of_rnn(packed, *state):
    return {"cu_seqlens": 2 * BOUNDS, "initial_state": leaf(*state)} if packed else {}


def gru(packed=False, chunk_size=None):
    bias = leaf(3, D) if packed else None
    run = {"backend": "triton", "chunk_size": chunk_size, "bias": bias}
    return para_gru(leaf(1, 2 * T, 3, D), leaf(3, D), **run, **options_of_rnn(packed, 2, D))[0]


def lstm(packed=False, chunk_size=None):
    run = {"backend": "triton", "chunk_size": chunk_size}
    return para_lstm(leaf(1, 2 * T, 3, D), leaf(3, D), leaf(2, D), **run, **options_of_rnn(packed, 2, 2, D))[0]


def heads(cell="slstm", packed=False):
    G, NS = {"slstm": (4, 4), "gru": (3, 1)}[cell]
    state = {"initial_state": leaf(2, NS, 2, D).abs(), "cu_seqlens": BOUNDS} if packed else {}
    return head_rnn(leaf(1, T, G, 2, D), leaf(G, 2, D, D), cell, backend="triton", **state)[0]


def delta(packed=False, n=1, narrow=False):
    tensors = [leaf(1, T, 1, D), leaf(1, T, n, 1, D), leaf(1, T, n, 1, D)]
    tensors = [x.half() for x in tensors] if narrow else tensors
    g = torch.zeros(1, T, 1) if packed else None
    more = {"qk_l2norm": not packed, "beta_max": 1.0 if narrow else 2.0} | options(packed, 2, 1, D, D)
    return gated_delta(*tensors, torch.rand(1, T, n, 1), g, backend="triton", **more)[0]


def state_space(packed=False, dt_softplus=False):
    x, dt, A = leaf(1, T, 2, D), leaf(1, T, 2), -torch.rand(2)
    more = {"dt_bias": leaf(2), "D": leaf(2)} if dt_softplus else {}
    dt = dt if dt_softplus else dt.sigmoid()
    more |= {"dt_softplus": dt_softplus} | options(packed, 2, 2, D, D)
    return ssd(x, dt, A, leaf(1, T, 1, D), leaf(1, T, 1, D), backend="triton", **more)[0]


OPS = {
    "ssd": (state_space, "ssd.triton_op", "scan"),
    "gated_delta": (delta, "gated_delta.triton_op", "delta"),
    "causal_conv1d": (conv, "causal_conv1d.triton_op", "convolve_backward"),
    "gated_rms_norm": (norm, "gated_rms_norm.triton_norm", "norm_backward"),
    "diagonal_scan": (scan, "diagonal_scan.triton_op", "scan_backward"),
    "linear_cross_entropy": (loss, "linear_cross_entropy.triton_softmax", "log_partition"),
    "para_gru": (gru, "common.triton_shooting", "solve_backward"),
    "para_lstm": (lstm, "common.triton_shooting", "solve_backward"),
    "head_rnn": (heads, "head_rnn.triton_op", "backward"),
}


@pytest.fixture
def due(monkeypatch, tmp_path):
    """Kernels check themselves in the interpreter too; returns the cases that have been checked."""
    monkeypatch.setattr(self_check, "INTERPRETED_TOO", True)
    return lambda: sorted(file.name for file in tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "run, arguments",
    [
        (conv, {}), (conv, {"packed": True}), (norm, {}), (norm, {"gated": False}),
        (scan, {}), (scan, {"packed": True}), (scan, {"packed": True, "use_complex": True}),
        (delta, {}), (delta, {"packed": True, "n": 2}), (delta, {"narrow": True}),
        (state_space, {}), (state_space, {"packed": True, "dt_softplus": True}),
        (loss, {}), (loss, {"vocabulary": 32}), (gru, {}), (gru, {"packed": True, "chunk_size": 16}),
        (lstm, {"chunk_size": 16}), (lstm, {"packed": True}), (heads, {}), (heads, {"cell": "gru", "packed": True}),
    ],
)  # fmt: skip
def test_ops_check_their_kernels_once(run, arguments, due, monkeypatch):
    monkeypatch.setattr(triton_launch, "HOPPER", triton_launch.Tiles(16, 64))
    cases = 2 if run in (loss, delta, state_space) else 1  # forward and backward apart
    take_statistics()
    state = torch.get_rng_state()
    run(**arguments).sum().backward()
    first, statistics = torch.get_rng_state(), take_statistics()
    assert len(due()) == cases
    torch.set_rng_state(state)
    self_check._agreed.clear()  # another process
    run(**arguments).sum().backward()
    assert torch.equal(torch.get_rng_state(), first) and take_statistics() == statistics
    assert len(due()) == cases


@pytest.mark.parametrize("op", OPS)
def test_ops_find_a_wrong_result(op, due, monkeypatch):
    run, module, function = OPS[op]
    module = importlib.import_module(f"riverrun.kernels.{module}")
    right = getattr(module, function)

    def wrong(*args):
        first, second, *rest = right(*args)
        return first, 1.1 * second, *rest

    monkeypatch.setattr(module, function, wrong)
    monkeypatch.setattr(triton_launch, "HOPPER", triton_launch.Tiles(16, 64))
    with pytest.raises(RuntimeError, match=f"{op} with .* the Triton kernels differ from the chunked form by"):
        run()
    assert not due()


def test_modes_of_the_caller_do_not_matter(due):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        conv()
    assert len(due()) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_does_not_see_the_check(reentrant, due):
    x, weight = leaf(1, T, D), leaf(D, 4)

    def run(x):
        return causal_conv1d(x, weight, backend="triton")[0].square().sum()

    got = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), [x, weight])
    if reentrant:
        checkpoint(run, x, use_reentrant=True).backward()
        got = x.grad, weight.grad
    assert len(due()) == 1
    torch.testing.assert_close(got, torch.autograd.grad(run(x), [x, weight]), rtol=0, atol=0)


def test_a_check_may_be_first_met_in_a_backward_pass(due):
    x, weight = leaf(1, T, D), leaf(D)
    checkpoint(lambda x: diagonal_scan(x, weight, backend="triton")[0].sum(), x, use_reentrant=True).backward()
    assert len(due()) == 2  # without gradients, and with them


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_does_not_see_the_check(dynamic, due):
    x, weight = leaf(1, T, D), leaf(D, 4)

    def run(x):
        return causal_conv1d_triton(x, weight, None, True, None, None)[0].square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(x), run(x))
    assert len(due()) == 1


def test_other_types_are_checked_apart(due):
    for dtype in (torch.float32, torch.float16):
        causal_conv1d(leaf(1, T, D, dtype=dtype), leaf(D, 4), backend="triton")
    assert len(due()) == 2
