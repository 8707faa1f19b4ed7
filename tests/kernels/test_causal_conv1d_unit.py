"""causal_conv1d whose outputs have unit length by heads: against F.conv1d and F.silu of each sequence in float64, the
Triton kernels run by Triton's interpreter, and compiled for Hopper and Ampere."""

import dataclasses
from pathlib import Path

import pytest
import torch
from compiling import CARDS
from test_causal_conv1d import BACKENDS, DEVICE, DOCUMENTS, assert_triton_equals, bounds_of, with_gradients

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.kernels.common import self_check

HEADS = 3


def make(B, T, unit, W=4, num_states=None, dtype=torch.float64):
    """x, weight, bias, initial_state, all leaves."""
    D = HEADS * unit
    sizes = (B, T, D), (D, W), (D,), (num_states or B, W - 1, D)
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def in_torch(x, weight, bias, state, unit, lengths=None, activation="silu"):
    """One sequence at a time."""
    ys, states = [], []
    D = x.shape[-1]
    sequences = x[0].split(lengths) if lengths else x.unbind(0)
    for sequence, before in zip(sequences, state):
        row = torch.cat([before, sequence])
        ys.append(torch.nn.functional.conv1d(row.T, weight[:, None], bias, groups=D).T)
        states.append(row[len(sequence) :])
    y = torch.cat(ys)[None] if lengths else torch.stack(ys)
    heads = (torch.nn.functional.silu(y) if activation else y).unflatten(-1, (HEADS, unit))
    heads = heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return heads.flatten(-2), torch.stack(states)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("unit", [1, 2, 5])
@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_equal_torch(backend, T, unit, activation):
    x, weight, bias, state = inputs = make(2, T, unit)
    got = causal_conv1d(x, weight, bias, activation=activation, unit=unit, initial_state=state, backend=backend)
    want = in_torch(*inputs, unit, activation=activation)
    torch.testing.assert_close(with_gradients(*got, inputs), with_gradients(*want, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_equal_torch(backend):
    x, weight, bias, state = inputs = make(1, sum(DOCUMENTS), 4, num_states=len(DOCUMENTS))
    options = {"activation": "silu", "unit": 4, "cu_seqlens": bounds_of(DOCUMENTS), "backend": backend}
    got = causal_conv1d(x, weight, bias, initial_state=state, **options)
    want = in_torch(*inputs, 4, DOCUMENTS)
    torch.testing.assert_close(with_gradients(*got, inputs), with_gradients(*want, inputs), rtol=1e-9, atol=1e-10)


def test_all_channels_may_be_one_unit():
    x, weight, bias, _ = make(2, 7, 4)
    y, _ = causal_conv1d(x, weight, bias, unit=HEADS * 4)
    want = torch.nn.functional.normalize(causal_conv1d(x, weight, bias)[0], dim=-1)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def run_triton(inputs, unit, lengths=None, activation="silu", use_state=True, use_final=True, dtype=torch.float32):
    """y, final state and gradients by the Triton kernels, and by torch in float64."""
    results = []
    for triton, device in ((True, DEVICE), (False, "cpu")):
        leaves = [t.detach().to(dtype if i in (0, 3) else torch.float32) for i, t in enumerate(inputs)]
        leaves = [t.to(device, None if triton else torch.float64).requires_grad_() for t in leaves]
        x, weight, bias, state = leaves
        if not use_state:
            leaves, state = leaves[:3], None if triton else torch.zeros_like(state)
        if triton:
            bounds = bounds_of(lengths).to(device) if lengths else None
            options = {"activation": activation, "unit": unit, "cu_seqlens": bounds, "backend": "triton"}
            y, final = causal_conv1d(x, weight, bias, initial_state=state, **options)
        else:
            y, final = in_torch(x, weight, bias, state, unit, lengths, activation)
        outputs = [y, final] if use_final else [y]
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(t.shape, generator=generator).to(dtype).to(t) for t in outputs]
        results.append([y, final, *torch.autograd.grad(outputs, leaves, upstream)])
    return results


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("unit", [2, 4, 5, 8, 12])
@pytest.mark.parametrize("T", [1, 2, 35])
def test_triton_rows_equal_torch(T, unit, activation):
    assert_triton_equals(*run_triton(make(2, T, unit), unit, activation=activation), tolerance=2e-5)


@pytest.mark.parametrize("use_state, use_final", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("W, unit", [(2, 4), (4, 4), (4, 6), (1, 4), (8, 3)])
def test_triton_documents_equal_torch(W, unit, use_state, use_final):
    inputs = make(1, sum(DOCUMENTS), unit, W, num_states=len(DOCUMENTS))
    assert_triton_equals(*run_triton(inputs, unit, DOCUMENTS, "silu", use_state, use_final), tolerance=2e-5)


@pytest.mark.parametrize("unit", [2, 3, 4, 8])
def test_triton_blocks_of_heads(unit, monkeypatch):
    """Of one head or of several, the last block short; and heads wider than a block would be."""
    from riverrun.kernels.causal_conv1d import triton_op

    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(triton_op, name, dataclasses.replace(getattr(triton_op, name), channels=4))
    inputs = make(1, sum(DOCUMENTS), unit, num_states=len(DOCUMENTS))
    assert_triton_equals(*run_triton(inputs, unit, DOCUMENTS), tolerance=2e-5)


def test_triton_long_lanes(monkeypatch):
    from riverrun.kernels.causal_conv1d import triton_op

    monkeypatch.setattr(triton_op, "SHORTEST", 64)
    lengths = [30, 1, 22, 5, 41, 2, 2, 33, 4, 20]
    assert_triton_equals(*run_triton(make(1, sum(lengths), 4, num_states=len(lengths)), 4, lengths), tolerance=2e-5)


@pytest.mark.parametrize("backend", ["triton", "chunked", "reference"])
def test_a_head_of_zeros_stays_finite(backend):
    x, weight, _, _ = (t.detach().float().to(DEVICE) for t in make(1, 6, 4))
    x[:, 2:, :4] = 0
    x.requires_grad_()
    y, _ = causal_conv1d(x, weight, activation="silu", unit=4, backend=backend)
    assert not y[:, 5, :4].any() and y.isfinite().all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


# Triton's interpreter cuts off the digits beyond bfloat16, a GPU rounds
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_triton_narrow_types_round_once(dtype, tolerance):
    got, want = run_triton(make(2, 40, 8), 8, dtype=dtype)
    assert [t.dtype for t in got] == [dtype] * 3 + [torch.float32] * 2 + [dtype]
    assert_triton_equals(got, want, tolerance)


def test_triton_compiles_without_graph_breaks():
    from riverrun.kernels.causal_conv1d.triton_op import causal_conv1d_triton

    inputs = [t.detach().float().to(DEVICE).requires_grad_() for t in make(1, 9, 4)]

    def run(x, weight, bias, state):
        return causal_conv1d_triton(x, weight, bias, True, state, None, 4)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = with_gradients(*(t.cpu() for t in compiled(*inputs)), inputs)
    torch.testing.assert_close(got, with_gradients(*(t.cpu() for t in run(*inputs)), inputs), rtol=0, atol=0)


def test_the_kernels_check_themselves(monkeypatch, tmp_path):
    from riverrun.kernels.causal_conv1d import triton_op

    monkeypatch.setattr(self_check, "_folder", lambda: tmp_path)
    monkeypatch.setattr(self_check, "_agreed", set())
    monkeypatch.setattr(self_check, "INTERPRETED_TOO", True)
    x, weight, *_ = (t.detach().float().to(DEVICE) for t in make(1, 9, 4))
    causal_conv1d(x, weight, unit=4, backend="triton")
    causal_conv1d(x, weight, backend="triton")
    assert len(list(tmp_path.glob("*.json"))) == 2
    form = triton_op.causal_conv1d_chunked
    monkeypatch.setattr(triton_op, "causal_conv1d_chunked", lambda *inputs: form(*inputs[:-1], None))
    with pytest.raises(RuntimeError, match="unit=6"):
        causal_conv1d(x, weight, unit=6, backend="triton")


def test_mistakes_are_named():
    x, weight, *_ = make(1, 5, 4)
    for unit in (0, -1, 5, 24):
        with pytest.raises(ValueError, match=f"unit={unit} must divide the 12 channels"):
            causal_conv1d(x, weight, unit=unit)
    wide = torch.zeros(1, 2, 2048, device=DEVICE)
    with pytest.raises(ValueError, match="units of up to 1024 channels, got 2048"):
        causal_conv1d(wide, wide.new_zeros(2048, 4), unit=2048, backend="triton")


@pytest.mark.parametrize("card", CARDS)
def test_compiles_for(card):
    compile_kernels, shared_limit = CARDS[card]
    kernels = compile_kernels(Path(__file__).with_name("launches_causal_conv1d_unit.py"))
    names = {"forward_kernel", "backward_kernel", "initial_gradient_kernel", "_positions_kernel"}
    assert {k["kernel"] for k in kernels} == names
    for kernel in kernels:
        assert kernel["shared"] <= shared_limit and kernel["stack"] == 0, kernel
        if kernel["launch"] == "launch_heads_of_128":  # three programs a multiprocessor; sums stay in their threads
            assert kernel["registers"] <= 168 and kernel["converts"] == kernel["shared"] == 0, kernel
