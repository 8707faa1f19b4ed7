"""gated_delta in Triton, run by its interpreter, against the step loop in float64; and compiled without a GPU."""

from pathlib import Path

import pytest
import torch
from compiling import SHARED_LIMIT, SHARED_LIMIT_OF_AMPERE, compile_for_ampere, compile_for_hopper

from riverrun.kernels.common import triton_segments
from riverrun.kernels.gated_delta import gated_delta, triton_launch


@pytest.fixture
def chunk(monkeypatch):
    """Sets the sub-steps of a chunk, for short sequences of several."""
    return lambda size: monkeypatch.setattr(triton_launch, "HOPPER", triton_launch.Tiles(size, 64))


def make_inputs(B, T, n=1, H=2, K=16, V=16, S=None, gate="mild", beta=None, dtype=torch.float32):
    """q, k, v, beta, g, initial_state."""
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, n, H, K), torch.randn(B, T, n, H, V)
    betas = 2 * torch.rand(B, T, n, H) if beta is None else torch.full((B, T, n, H), float(beta))
    g = None if gate is None else -0.3 * torch.rand(B, T, H)
    if gate == "strong":
        g[:, ::3] = -80.0
    state = torch.randn(S or B, H, K, V)
    return [*(x.to(dtype) for x in (q, k, v)), betas, g, state]


def run(inputs, dtype=None, **options):
    """o, final state, and the gradients."""
    leaves = [None if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    *tensors, state = leaves
    o, final = gated_delta(*tensors, scale=0.3, initial_state=state, **{"qk_l2norm": True} | options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (o, final)]
    return [o, final, *torch.autograd.grad((o, final), [x for x in leaves if x is not None], upstream)]


def errors(inputs, backend="triton", **options):
    want = run(inputs, torch.float64, backend="reference", **{k: v for k, v in options.items() if k != "beta_max"})
    got = run(inputs, backend=backend, **options)
    return [((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want)]


@pytest.mark.parametrize("T", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equals_reference(T, n, chunk):
    chunk(16)
    assert max(errors(make_inputs(1, T, n))) < 1e-5


def test_equals_reference_in_chunks_of_64():
    """All four block rows of a chunk."""
    assert max(errors(make_inputs(1, 70))) < 1e-5
    assert max(errors(make_inputs(1, 30, 3, H=1))) < 1e-5


@pytest.mark.parametrize("K, V", [(32, 48), (48, 16), (20, 5), (3, 33)])
def test_head_sizes(K, V, chunk):
    """Tiles that divide, and tiles that are padded."""
    chunk(32)
    assert max(errors(make_inputs(2, 40, H=1, K=K, V=V))) < 1e-5


@pytest.mark.parametrize("gate", [None, "strong"])
def test_gates(gate, chunk):
    chunk(16)
    assert max(errors(make_inputs(1, 40, 2, gate=gate))) < 1e-5


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_steps_of_one_size(beta, chunk):
    chunk(32)
    inputs = make_inputs(1, 70, H=1, gate=None, beta=beta)
    inputs[1][:, 10:60] = inputs[1][:, 10:11]  # repeated keys
    inputs[1].copy_(torch.nn.functional.normalize(inputs[1], dim=-1))
    if beta == 2:  # reflections keep every rounding error, whose size depends on the order of the processor's sums
        assert max(errors(inputs)) < 4 * max(errors(inputs, "chunked"))
    else:
        assert max(errors(inputs)) < 1e-5
        assert max(errors(inputs, qk_l2norm=False)) < 1e-5  # without norms in the kernel


@pytest.mark.parametrize("bounds", [[0, 1, 2, 19, 40], [0, 16, 17, 40], [0, 39, 40], [0, 40]])
def test_documents(bounds, chunk):
    chunk(16)
    inputs = make_inputs(1, 40, S=len(bounds) - 1)
    assert max(errors(inputs, cu_seqlens=torch.tensor(bounds))) < 1e-5


@pytest.mark.parametrize("B, T, bounds", [(2, 71, None), (1, 71, [0, 1, 2, 35, 36, 71]), (1, 71, [0, 71])])
@pytest.mark.parametrize("K, V, n", [(16, 16, 1), (48, 32, 2)])
def test_segments(B, T, bounds, K, V, n, chunk, monkeypatch):
    """Walked side by side where sequences are few: several segments a sequence, of several chunks."""
    chunk(16)
    monkeypatch.setattr(triton_segments, "LEAST_CHUNKS", 1)
    S = B if bounds is None else len(bounds) - 1
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda _: max(3, 2 * S))
    inputs = make_inputs(B, T, n, H=1, K=K, V=V, S=S)
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    launch = triton_launch.Launch.of(inputs[1], inputs[2], options.get("cu_seqlens"), True)
    assert launch.segments.inner_end.sum() >= 4
    assert max(errors(inputs, **options)) < 1e-5
    assert max(errors([*inputs[:4], None, inputs[5]], **options)) < 1e-5


def test_narrow_types(chunk):
    chunk(16)
    assert max(errors(make_inputs(1, 40, dtype=torch.bfloat16))) < 2e-2
    inputs = make_inputs(1, 40, dtype=torch.float16)
    inputs[3] /= 2
    assert max(errors(inputs)) < 1e-3
    assert max(errors(inputs, beta_max=1)) < 2e-3


def test_a_thousand_reflections():
    """No decay, β = 2 and keys in three dimensions, as state tracking learns them: errors never fade. In float16, for
    the interpreter cuts numbers to bfloat16 instead of rounding them, and all its errors point one way."""
    T, K, V = 1024, 32, 16
    q, k, v, beta, _, state = make_inputs(1, T, H=1, K=K, V=V, gate=None, beta=2)
    k = torch.randn(1, T, 1, 1, 3) @ torch.linalg.qr(torch.randn(K, 3))[0].mT
    q, k, v = q.half(), k.half(), torch.zeros_like(v).half()

    def final(dtype, **options):
        tensors = (x.to(dtype) for x in (q, k, v))
        beta_, state_ = (x.to(torch.promote_types(dtype, torch.float32)) for x in (beta, state))
        return gated_delta(*tensors, beta_, initial_state=state_, qk_l2norm=True, **options)[1]

    want = final(torch.float64, backend="chunked")
    chunked = (final(torch.float32, backend="chunked") - want).norm()
    assert (final(torch.float16, backend="triton") - want).norm() < 10 * chunked
    assert (final(torch.float16, backend="triton", beta_max=1) - want).norm() > 100 * chunked  # what rounding would do


def test_only_what_is_asked_for(chunk):
    """A loss of o alone, or of the final state alone; no initial state."""
    chunk(16)
    inputs = make_inputs(1, 20)[:5]
    for which in (0, 1):
        grads = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            loss = gated_delta(*leaves, backend=backend, qk_l2norm=True)[which].square().sum()
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for got, want in zip(*grads):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_user_errors():
    q, k, v, beta, g, _ = make_inputs(1, 4, K=512, V=16)
    with pytest.raises(ValueError, match="take K and V up to 256 and n up to 64, got K=512"):
        gated_delta(q, k, v, beta, g, backend="triton")
    with pytest.raises(ValueError, match="one row: expected batch size 1, got 2"):
        gated_delta(*make_inputs(2, 4)[:5], cu_seqlens=torch.tensor([0, 3, 4]), backend="triton")


def test_compiles_for_hopper():
    kernels = compile_for_hopper(Path(__file__).with_name("launches_gated_delta.py"))
    names = ("inverse", "scores", "forward", "between", "backward", "within", "gradients")
    assert {k["kernel"] for k in kernels} == {f"{name}_kernel" for name in names}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT, kernel
        if kernel["launch"] == "launch_gated_deltanet":
            assert kernel["stack"] <= (128 if kernel["kernel"] == "gradients_kernel" else 64), f"spills: {kernel}"
        if kernel["kernel"] in ("forward_kernel", "backward_kernel", "within_kernel", "gradients_kernel"):
            assert kernel["wgmma"] > 0, kernel


def test_compiles_for_ampere():
    for kernel in compile_for_ampere(Path(__file__).with_name("launches_gated_delta.py")):
        assert kernel["shared"] <= SHARED_LIMIT_OF_AMPERE, kernel
        assert kernel["stack"] <= 500, f"spills: {kernel}"


def test_equals_transformers():
    """Qwen3-Next's own torch form of the gated delta rule, which OLMo-Hybrid shares."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v, beta, g, _ = make_inputs(1, 70, K=16, V=24, beta=None)
    one = [x[:, :, 0] for x in (k, v, beta)]
    want, state = torch_chunk_gated_delta_rule(
        q, one[0], one[1], g, one[2], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    o, final = gated_delta(q, k, v, beta, g, qk_l2norm=True, backend="triton")
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-5)
