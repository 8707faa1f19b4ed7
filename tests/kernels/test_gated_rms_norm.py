"""gated_rms_norm against its formula written out, in float64; the Triton kernels, run by Triton's interpreter, in
float32 and narrower types (`test_causal_conv1d.py` compiles them for GPUs)."""

import pytest
import torch

from riverrun.kernels.gated_rms_norm import gated_rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels


def formula(x, gate, weight, eps, groups, norm_before_gate):
    silu = 1.0 if gate is None else gate / (1 + torch.exp(-gate))
    y = x if norm_before_gate else x * silu
    blocks = [b / (b.square().mean(-1, keepdim=True) + eps).sqrt() for b in y.chunk(groups, dim=-1)]
    y = torch.cat(blocks, dim=-1) * weight
    return y * silu if norm_before_gate else y


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(12,), (3, 5, 12), (2, 3, 4, 12)])
def test_equals_formula(shape, gated, groups, norm_before_gate):
    inputs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in (shape, shape, (12,))]
    x, gate, weight = inputs
    if not gated:
        inputs, gate = [x, weight], None
    upstream = torch.randn(shape, dtype=torch.float64)
    results = []
    for function in (gated_rms_norm, formula):
        y = function(x, gate, weight, eps=1e-3, groups=groups, norm_before_gate=norm_before_gate)
        results.append([y, *torch.autograd.grad((y * upstream).sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_groups_are_normalised_apart():
    x, gate, weight = torch.randn(4, 12), torch.randn(4, 12), torch.randn(12)
    y = gated_rms_norm(x, gate, weight, groups=3)
    changed = x.clone()
    changed[:, 4:8] *= 10
    same = gated_rms_norm(changed, gate, weight, groups=3) == y
    assert same[:, :4].all() and same[:, 8:].all()


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_bfloat16_rounds_once(norm_before_gate):
    """Large inputs: their mean square is taken in float32."""
    x, gate = (torch.randn(7, 64) * 100).bfloat16(), torch.randn(7, 64).bfloat16()
    weight = torch.rand(64) + 0.5
    y = gated_rms_norm(x, gate, weight, norm_before_gate=norm_before_gate)
    exact = formula(x.double(), gate.double(), weight.double(), 1e-5, 1, norm_before_gate)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=4e-3, atol=1e-6)


def test_bad_arguments():
    x, weight = torch.randn(3, 12), torch.ones(12)
    with pytest.raises(ValueError, match="weight must have shape"):
        gated_rms_norm(x, None, weight[:6])
    with pytest.raises(ValueError, match="gate must have the shape of x"):
        gated_rms_norm(x, x[:1], weight)
    with pytest.raises(ValueError, match="must divide"):
        gated_rms_norm(x, None, weight, groups=5)
    with pytest.raises(ValueError, match="unknown backend"):
        gated_rms_norm(x, None, weight, backend="fast")
    with pytest.raises(ValueError, match="use backend='chunked' for float64"):
        gated_rms_norm(x.double(), None, weight, backend="triton")
    with pytest.raises(ValueError, match="up to 16384 channels"):
        gated_rms_norm(torch.zeros(1, 20_000), None, torch.ones(20_000), backend="triton")


def run_triton(shape, dtype=torch.float32, gated=True, view=lambda x: x, **options):
    """The output and the gradients by the Triton kernels, and by torch in float64."""
    x, gate, upstream = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = torch.randn(view(x).shape[-1])
    results = []
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        to = {"device": device, "dtype": None if backend == "triton" else torch.float64}
        leaves = [t.to(**to).requires_grad_() for t in ((x, gate, weight) if gated else (x, weight))]
        gate_leaf = view(leaves[1]) if gated else None
        y = gated_rms_norm(view(leaves[0]), gate_leaf, leaves[-1], eps=1e-3, backend=backend, **options)
        results.append([y, *torch.autograd.grad(y, leaves, view(upstream.to(**to)))])
    return results


def assert_triton_equals(got, want, tolerance=1e-5):
    for a, b in zip(got, want):
        assert a.shape == b.shape
        assert (a.cpu() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(12,), (3, 5, 12), (2, 3, 4, 12), (2, 3, 2, 2, 12), (1, 4200)])
def test_triton_equals_formula(shape, gated, groups, norm_before_gate):
    assert_triton_equals(*run_triton(shape, gated=gated, groups=groups, norm_before_gate=norm_before_gate))


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_triton_programs_go_through_many_rows(groups, norm_before_gate, monkeypatch):
    from riverrun.kernels.gated_rms_norm import triton_norm

    monkeypatch.setattr(triton_norm, "multiprocessors", lambda x: 1)
    monkeypatch.setattr(triton_norm, "ELEMENTS", 32)
    assert_triton_equals(*run_triton((100, 12), groups=groups, norm_before_gate=norm_before_gate))


@pytest.mark.parametrize(
    "shape, view",
    [
        ((2, 5, 30), lambda x: x[..., 7:19]),
        ((2, 5, 60), lambda x: x[..., 3:51].unflatten(-1, (4, 12))),
        ((2, 5, 24), lambda x: x[..., ::2]),
        ((12, 7), lambda x: x.T),
    ],
)
def test_triton_takes_views(shape, view):
    assert_triton_equals(*run_triton(shape, view=view, norm_before_gate=True))


def test_triton_reads_slices_in_place():
    from riverrun.kernels.gated_rms_norm.triton_norm import _tokens

    projected = torch.zeros(2, 5, 60)
    for x in (projected[..., 12:36], projected[..., 12:36].unflatten(-1, (2, 12))):
        assert _tokens(x).data_ptr() == x.data_ptr() and _tokens(x).shape == (10, 24)


# Triton's interpreter cuts off the digits beyond bfloat16, a GPU rounds
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-3), (torch.float16, 5e-4)])
def test_triton_narrow_types_round_once(dtype, tolerance, norm_before_gate):
    got, want = run_triton((7, 64), dtype, norm_before_gate=norm_before_gate)
    assert [t.dtype for t in got] == [dtype] * 3 + [torch.float32]
    assert_triton_equals(got, want, tolerance)


def test_triton_compiles_without_graph_breaks():
    from riverrun.kernels.gated_rms_norm.triton_norm import gated_rms_norm_triton

    inputs = [torch.randn(s, device=DEVICE).requires_grad_() for s in ((2, 3, 12), (2, 3, 12), (12,))]

    def run(x, gate, weight):
        return gated_rms_norm_triton(x, gate, weight, 1e-5, 2, False)

    results = []
    for function in (torch.compile(run, backend="aot_eager", fullgraph=True), run):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
