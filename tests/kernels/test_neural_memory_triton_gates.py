"""The Triton kernels of a memory's gates, run by the interpreter, against torch in float64; and compiled without a
GPU."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from compiling import CARDS

from riverrun.kernels.common import self_check
from riverrun.kernels.neural_memory import triton_gates as module
from riverrun.kernels.neural_memory.gates import triton_gates
from riverrun.kernels.neural_memory.rule import Gates
from riverrun.kernels.neural_memory.triton_gates import chunk_gates_triton

MOMENTUM = pytest.mark.parametrize("momentum", [True, False])


def make_gates(T, B=1, H=2, momentum=True):
    log_keep, log_momentum = -torch.rand(2, B, T, H) / 4
    return Gates(log_keep, torch.rand(B, T, H), log_momentum if momentum else None)


def run(form, gates, chunk_size, cu_seqlens, dtype):
    """What there is of ChunkGates, and the gradients of all gates through all of it."""
    gates = gates.each(lambda x: x.to(dtype).detach().requires_grad_())
    outputs = [x for x in form(gates, chunk_size, cu_seqlens) if x is not None]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return outputs, torch.autograd.grad(outputs, [x for x in gates if x is not None], upstream)


def assert_equal(gates, chunk_size, bounds=None, of_gradients=1e-5):
    """Entries to their own last digits, however small; gradients, whose terms cancel, to those of the largest."""
    bounds = None if bounds is None else torch.tensor(bounds)
    got, grads = run(chunk_gates_triton, gates, chunk_size, bounds, torch.float32)
    want, want_grads = run(triton_gates, gates, chunk_size, bounds, torch.float64)
    assert len(got) == len(want) == (2 if gates.log_momentum is None else 5)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=1e-36)
    for x, y in zip(grads, want_grads, strict=True):
        assert x.isfinite().all()
        assert (x - y).abs().max() <= of_gradients * y.abs().max()


@MOMENTUM
@pytest.mark.parametrize("chunk_size, T", [(16, 16), (16, 37), (32, 50), (64, 70), (64, 3), (128, 150)])
def test_chunk_sizes(chunk_size, T, momentum):
    """Whole chunks, and ragged ones; short chunks of several rows, which are not mixed up."""
    assert_equal(make_gates(T, B=2 if T < 64 else 1, momentum=momentum), chunk_size)


@MOMENTUM
@pytest.mark.parametrize("H", [1, 3, 6, 20])
def test_heads(H, momentum):
    """Those of one program, of several, and programs with fewer than they have room for."""
    assert_equal(make_gates(20, H=H, momentum=momentum), 16)
    assert_equal(make_gates(40, H=H, momentum=momentum), 32)


@MOMENTUM
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_documents(chunk_size, momentum):
    """Of 1, 17 and 64 tokens, and of none; chunks too many keep all and add nothing."""
    bounds = [0, 1, 18, 18, 82]
    gates = make_gates(82, momentum=momentum)
    assert_equal(gates, chunk_size, bounds)
    made = chunk_gates_triton(gates, chunk_size, torch.tensor(bounds))
    used = sum(-(-(b - a) // chunk_size) for a, b in pairwise(bounds))
    assert len(made.decay) > used
    assert (made.decay[used:] == 1).all() and not made.weight[used:].any()
    if momentum:
        assert (made.momentum_decay[used:] == 1).all()
        assert not made.carry[used:].any() and not made.momentum_weight[used:].any()


@pytest.mark.parametrize("name", ["log_keep", "log_momentum"])
@pytest.mark.parametrize("value", [-40.0, -20.0, -1e-6, 0.0, -torch.inf])
@pytest.mark.parametrize("every", [1, 5])
def test_extreme_gates(name, value, every):
    """Everywhere, and beside others near 1, whose sums of logarithms their own would swallow."""
    gates = make_gates(70, H=1)
    gates.log_keep[:, ::2] = -1e-4
    gates.log_momentum[:, 1::2] = -1e-4
    getattr(gates, name)[:, ::every] = value
    for some in (gates, gates._replace(log_momentum=None)):
        assert_equal(some, 64)


def test_what_is_forgotten_has_no_gradient():
    gates = make_gates(40, H=1)
    gates.log_keep[:, ::3] = -torch.inf
    gates.log_momentum[:, ::4] = -torch.inf
    _, (of_keep, _, of_momentum) = run(chunk_gates_triton, gates, 32, None, torch.float32)
    assert not of_keep[:, ::3].any() and of_keep[:, 1::3].any()
    assert not of_momentum[:, ::4].any() and of_momentum[:, 2::4].any()


def test_no_steps():
    gates = make_gates(20)
    gates.lr.zero_()
    assert_equal(gates, 16)


def test_above_the_diagonal_no_gradient_is_read():
    """Kernels leave there what they like."""
    gates = make_gates(20)
    made = chunk_gates_triton(gates.each(torch.Tensor.requires_grad_), 16, None)
    upstream = torch.randn(made.weight.shape)
    upper = torch.ones(16, 16, dtype=torch.bool).triu(1)
    for x, y in zip(
        torch.autograd.grad(made.weight, gates, upstream, retain_graph=True),
        torch.autograd.grad(made.weight, gates, upstream.masked_fill(upper, torch.nan)),
    ):
        assert torch.equal(x, y)


@MOMENTUM
def test_only_what_is_asked_for(momentum):
    """A loss of one output alone."""
    gates = make_gates(20, momentum=momentum)
    for which in range(5 if momentum else 2):
        grads = []
        for form, dtype in ((chunk_gates_triton, torch.float32), (triton_gates, torch.float64)):
            leaves = gates.each(lambda x: x.to(dtype).detach().requires_grad_())  # noqa: B023
            loss = form(leaves, 16, None)[which].square().sum()
            leaves = [x for x in leaves if x is not None]
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for got, want in zip(*grads):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_what_is_kept_for_gradients():
    """Nothing but the gates."""
    gates, kept = make_gates(40).each(torch.Tensor.requires_grad_), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        chunk_gates_triton(gates, 16, None)
    assert kept == [80, 80, 80]


@MOMENTUM
@pytest.mark.parametrize("packed", [True, False])
def test_compiled_by_torch(momentum, packed):
    """As an operator that torch.compile does not look into, with the shapes that it says it has."""
    log_keep, lr, log_momentum = make_gates(20, B=1 if packed else 2, momentum=momentum)
    arguments = [log_keep, lr, log_momentum, torch.tensor([0, 3, 20]) if packed else None, 16]
    checked = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(module._forward.overload, arguments, **checked)
    torch.library.opcheck(module._backward.overload, [*module._forward(*arguments), *arguments], **checked)
    gates = Gates(log_keep, lr, log_momentum).each(torch.Tensor.requires_grad_)
    leaves = [x for x in gates if x is not None]

    def loss(gates):
        return sum(x.sin().sum() for x in chunk_gates_triton(gates, 16, arguments[3]) if x is not None)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(form(gates), leaves) for form in (compiled, loss))):
        torch.testing.assert_close(got, want)


def test_checks_itself(monkeypatch, tmp_path):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(self_check, "_agreed", set())
    monkeypatch.setattr(self_check, "INTERPRETED_TOO", True)
    for i, (momentum, bounds) in enumerate([(True, None), (False, [0, 3, 20])]):
        assert_equal(make_gates(20, H=1, momentum=momentum), 16, bounds)
        assert len(list(tmp_path.rglob("*.json"))) == 2 * (i + 1)  # forwards and backwards
    monkeypatch.setattr(self_check, "_agreed", set())
    monkeypatch.setattr(self_check, "_sources", lambda: "edited")
    right = module.Launch.backward
    monkeypatch.setattr(module.Launch, "backward", lambda *x: right(*x)._replace(lr=x[0].gates.lr))
    with pytest.raises(RuntimeError, match=r"gates of neural_memory with H=1, chunk_size=16.*gradients=True.*differ"):
        assert_equal(make_gates(20, H=1), 16)


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_without_spilling(card):
    compiler, _ = CARDS[card]
    kernels = compiler(Path(__file__).with_name("launches_neural_memory_gates.py"))
    assert {k["kernel"] for k in kernels} == {"forward_kernel", "backward_kernel"}
    assert all(k["stack"] == 0 for k in kernels), kernels
