"""memory_gates against its formulas in float64; the Triton kernels, run by Triton's interpreter, and compiled for
Hopper and Ampere."""

import math
from pathlib import Path

import pytest
import torch
from compiling import CARDS

from riverrun.kernels.common import self_check
from riverrun.kernels.memory_gates import Logits, memory_gates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels


def make(B, T, N, momentum=True, dtype=torch.float64):
    """Logits that are slices of one projection, as a layer has them, and biases."""
    count = 3 if momentum else 2
    projected = torch.randn(B, T, 3 * N + 1, dtype=dtype) * 2
    logits = Logits(*projected[..., 1:].split(N, dim=-1)[:count])
    return logits, Logits(*(torch.randn(N, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(count)))


def formulas(logits, biases, scale=1.0, shrink=False):
    sums = [None if x is None else x + (b[:, None] if x.dim() == 4 else b) for x, b in zip(logits, biases)]
    alpha, step = 1 / (1 + (-sums[0]).exp()), scale / (1 + (-sums[1]).exp())
    if sums[2] is None:
        return (1 - alpha).log(), step, None
    eta = 1 / (1 + (-sums[2]).exp())
    if shrink:
        step = step * (1 - (eta[..., None] if eta.dim() < step.dim() else eta))
    return (1 - alpha).log(), step, eta.log()


def run(form, logits, biases, dtype=None, device="cpu", **options):
    """The gates, and the gradients of logits and biases."""
    inputs = [[None if x is None else x.detach().to(device, dtype) for x in part] for part in (logits, biases)]
    leaves = [x.requires_grad_() for part in inputs for x in part if x is not None]
    made = [x for x in form(Logits(*inputs[0]), Logits(*inputs[1]), **options) if x is not None]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in made]
    return made, torch.autograd.grad(made, leaves, upstream)


OPTIONS = [{}, {"scale": 0.3, "shrink": True}, {"scale": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("out", [None, 3])
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_equals_the_formulas(backend, out, momentum, options):
    logits, biases = make(2, 5, 4, momentum)
    if out is not None:
        logits = logits._replace(alpha=torch.randn(2, 5, 4, out).double(), theta=torch.randn(2, 5, 4, out).double())
    got = run(memory_gates, logits, biases, backend=backend, **options)
    torch.testing.assert_close(got, run(formulas, logits, biases, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("B, T, N", [(2, 35, 4), (1, 1, 1), (3, 1, 16), (1, 700, 5), (1, 20, 70)])
def test_triton_equals_the_formulas(B, T, N, momentum, options):
    logits, biases = make(B, T, N, momentum, torch.float32)
    got = run(memory_gates, logits, biases, device=DEVICE, backend="triton", **options)
    want = run(formulas, logits, biases, torch.float64, **options)
    for x, y in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert x.dtype == torch.float32 and x.shape == y.shape
        torch.testing.assert_close(x.double().cpu(), y, rtol=2e-5, atol=2e-6)


def test_several_blocks_a_program(monkeypatch):
    from riverrun.kernels.memory_gates import triton_gates

    monkeypatch.setattr(triton_gates, "multiprocessors", lambda x: 1)
    logits, biases = make(1, 700, 5, dtype=torch.float32)
    got = run(memory_gates, logits, biases, device=DEVICE, backend="triton", shrink=True)[1]
    for x, y in zip(got, run(formulas, logits, biases, torch.float64, shrink=True)[1], strict=True):
        torch.testing.assert_close(x.double().cpu(), y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_logarithms_near_zero_are_exact(backend):
    """A memory that forgets half of itself in 100,000 tokens does so to its last digits, and none becomes infinite."""
    logit = torch.tensor([-80.0, -40, -20, -12, -6, -1, -1e-3, 0, 1e-3, 1, 6, 20, 80], device=DEVICE)
    logits = Logits(logit[None, None], torch.zeros_like(logit)[None, None], -logit[None, None])
    log_keep, _, log_momentum = memory_gates(logits, Logits(*torch.zeros(3, 13, device=DEVICE)), backend=backend)
    want = torch.tensor([-math.log1p(math.exp(x)) for x in logit.tolist()], dtype=torch.float64)
    for got in (log_keep, log_momentum):
        torch.testing.assert_close(got[0, 0].double().cpu(), want, rtol=1e-5, atol=0)


# Triton's interpreter cuts off the digits beyond bfloat16, a GPU rounds
def test_narrow_logits_give_wide_gates_and_narrow_gradients():
    logits, biases = make(2, 30, 6, dtype=torch.bfloat16)
    exact = run(formulas, logits, biases, torch.float64, shrink=True)
    for backend, device in (("triton", DEVICE), ("chunked", "cpu")):
        made, grads = run(memory_gates, logits, biases, device=device, backend=backend, shrink=True)
        assert [x.dtype for x in (*made, *grads)] == [torch.float32] * 3 + [torch.bfloat16] * 3 + [torch.float32] * 3
        for tolerance, got, want in (
            (2e-5, made, exact[0]),
            (8e-3, grads[:3], exact[1]),
            (2e-5, grads[3:], exact[1][3:]),
        ):
            for x, y in zip(got, want):
                assert (x.cpu() - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_gradient_of_one_gate_alone(chosen):
    logits, biases = make(1, 9, 3, dtype=torch.float32)
    found = []
    for form, dtype, device in ((memory_gates, torch.float32, DEVICE), (formulas, torch.float64, "cpu")):
        alone = [x.to(device, dtype).detach().requires_grad_() for x in logits]
        options = {"backend": "triton"} if form is memory_gates else {}
        made = form(Logits(*alone), Logits(*(b.to(device, dtype) for b in biases)), shrink=True, **options)
        found.append(torch.autograd.grad(made[chosen].sum(), alone, allow_unused=True, materialize_grads=True))
    for x, y in zip(*found):
        torch.testing.assert_close(x.double().cpu(), y, rtol=2e-5, atol=1e-6)


def test_slices_of_a_projection_are_read_in_place():
    from riverrun.kernels.memory_gates.triton_gates import _tokens

    projected = torch.zeros(2, 7, 12)
    assert _tokens(projected[..., 4:8]).data_ptr() == projected[..., 4:].data_ptr()
    assert _tokens(projected.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("momentum", [True, False])
def test_compiles_without_graph_breaks(momentum):
    from riverrun.kernels.memory_gates.triton_gates import memory_gates_triton

    logits, biases = make(1, 9, 4, momentum, torch.float32)

    def form(logits, biases):
        return memory_gates_triton(*logits, *biases, 0.5, True)

    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    got, want = (run(f, logits, biases, device=DEVICE) for f in (compiled, form))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_kernels_check_themselves(monkeypatch, tmp_path):
    from riverrun.kernels.memory_gates import triton_gates

    monkeypatch.setattr(self_check, "_folder", lambda: tmp_path)
    monkeypatch.setattr(self_check, "_agreed", set())
    monkeypatch.setattr(self_check, "INTERPRETED_TOO", True)
    for momentum, shrink in ((True, True), (True, False), (False, False)):
        logits, biases = make(1, 9, 3, momentum, torch.float32)
        run(memory_gates, logits, biases, device=DEVICE, backend="triton", shrink=shrink)
    assert len(list(tmp_path.glob("*.json"))) == 3
    wrong = triton_gates.memory_gates_reference
    monkeypatch.setattr(
        triton_gates, "memory_gates_reference", lambda *a: [x if x is None else x + 1 for x in wrong(*a)]
    )
    logits, biases = make(1, 9, 4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="memory_gates with N=4"):
        run(memory_gates, logits, biases, device=DEVICE, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": torch.zeros(2, 5)}, "alpha must have shape"),
        ({"theta": torch.zeros(2, 5, 4, 2)}, "theta must have shape that of alpha"),
        ({"eta": torch.zeros(2, 5, 3)}, r"eta must have shape \(B, T, N\)"),
        ({"eta": None}, "for no momentum give neither"),
    ],
)
def test_bad_logits(change, message):
    logits, biases = make(2, 5, 4)
    with pytest.raises(ValueError, match=f"memory_gates: .*{message}"):
        memory_gates(logits._replace(**change), biases)


def test_bad_options():
    logits, biases = make(2, 5, 4)
    with pytest.raises(ValueError, match="the bias of theta must have shape"):
        memory_gates(logits, biases._replace(theta=torch.zeros(3)))
    with pytest.raises(ValueError, match="unknown backend"):
        memory_gates(logits, biases, backend="fast")
    wide = logits._replace(alpha=torch.zeros(2, 5, 4, 3), theta=torch.zeros(2, 5, 4, 3))
    with pytest.raises(ValueError, match="use backend='chunked'"):
        memory_gates(wide, biases, backend="triton")


@pytest.mark.parametrize("card", CARDS)
def test_compiles_for(card):
    compile_kernels, shared_limit = CARDS[card]
    kernels = compile_kernels(Path(__file__).with_name("launches_memory_gates.py"))
    assert {k["kernel"] for k in kernels} == {"forward_kernel", "backward_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= shared_limit and kernel["stack"] == 0, kernel
