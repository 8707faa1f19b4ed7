"""The Triton kernels of gated_delta on real shapes, against the chunked form in float64 on the same card."""

import pytest
import torch

from riverrun.kernels.gated_delta import gated_delta


def make_inputs(B, T, n=1, H=4, K=128, V=128, S=None, gate=0.3, beta=None, dtype=torch.bfloat16):
    """q, k, v, beta, g, initial_state."""
    like = {"device": "cuda"}
    q, k, v = torch.randn(B, T, H, K, **like), torch.randn(B, T, n, H, K, **like), torch.randn(B, T, n, H, V, **like)
    betas = 2 * torch.rand(B, T, n, H, **like) if beta is None else torch.full((B, T, n, H), float(beta), **like)
    g = None if gate is None else -gate * torch.rand(B, T, H, **like)
    return [q.to(dtype), k.to(dtype), v.to(dtype), betas, g, torch.randn(S or B, H, K, V, **like)]


def run(inputs, dtype=None, **options):
    """o, final state, and the gradients."""
    leaves = [None if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    *tensors, state = leaves
    o, final = gated_delta(*tensors, qk_l2norm=True, initial_state=state, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in (o, final)]
    return [o, final, *torch.autograd.grad((o, final), [x for x in leaves if x is not None], upstream)]


def worst(inputs, **options):
    want = run(inputs, torch.float64, backend="chunked", cu_seqlens=options.get("cu_seqlens"))
    got = run(inputs, backend="triton", **options)
    return max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equals_float64(T, n):
    assert worst(make_inputs(1, T, n)) < 1e-2
    if n == 1:
        assert worst(make_inputs(1, T, beta=1), beta_max=1.0) < 2e-2


def test_equals_float64_on_a_long_sequence():
    assert worst(make_inputs(1, 65536, H=1)) < 1e-2


@pytest.mark.parametrize("K, V", [(32, 64), (64, 64), (96, 192), (192, 96), (256, 256), (128, 256)])
def test_head_sizes(K, V):
    assert worst(make_inputs(2, 500, K=K, V=V)) < 1e-2
    assert worst(make_inputs(2, 500, K=K, V=V, beta=1), beta_max=1.0) < 2e-2


@pytest.mark.parametrize("gate", [None, 1e-3, 60.0])
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_gates_and_steps(gate, beta):
    inputs = make_inputs(1, 500, gate=gate, beta=beta)
    inputs[1][:, 100:200] = inputs[1][:, 100:101]  # repeated keys
    assert worst(inputs) < 1e-2


def test_single_precision():
    assert worst(make_inputs(1, 500, 2, dtype=torch.float32)) < 1e-5


def test_documents():
    bounds = torch.tensor([0, 1, 2, 130, 131, 300, 497, 500], dtype=torch.int32, device="cuda")
    for n in (1, 3):
        assert worst(make_inputs(1, 500, n, S=7), cu_seqlens=bounds) < 1e-2


def test_documents_in_segments():
    """One head: long documents are walked in segments, side by side."""
    bounds = torch.tensor([0, 1, 5000, 5001, 8192, 16384], dtype=torch.int32, device="cuda")
    for n in (1, 2):
        assert worst(make_inputs(1, 16384, n, H=1, S=5), cu_seqlens=bounds) < 1e-2
    assert worst(make_inputs(2, 8192, H=1, gate=1e-3, beta=1), beta_max=1.0) < 2e-2


def test_a_thousand_reflections():
    """Within 10 times of the chunked form in float32, without decay, at β = 2 and with keys in three dimensions."""
    q, k, v, beta, _, state = make_inputs(1, 1024, gate=None, beta=2)
    basis = torch.linalg.qr(torch.randn(128, 3, device="cuda"))[0]
    k = (torch.randn(1, 1024, 1, 4, 3, device="cuda") @ basis.mT).bfloat16()

    def final(dtype, **options):
        tensors = (x.to(dtype) for x in (q, k, torch.zeros_like(v)))
        rest = (x.to(torch.promote_types(dtype, torch.float32)) for x in (beta, state))
        beta_, state_ = rest
        return gated_delta(*tensors, beta_, initial_state=state_, qk_l2norm=True, **options)[1]

    want = final(torch.float64, backend="chunked")
    chunked, triton = ((x - want).norm() / want.norm() for x in (
        final(torch.float32, backend="chunked"), final(torch.bfloat16, backend="triton")))  # fmt: skip
    print(f"relative error after 1,024 reflections: chunked float32 {chunked:.1e}, Triton {triton:.1e}")
    assert triton < 10 * chunked


def test_same_bits_every_time_without_waiting_for_the_device():
    inputs = make_inputs(1, 4096, S=3)
    bounds = torch.tensor([0, 100, 3000, 4096], dtype=torch.int32, device="cuda")
    first = run(inputs, backend="triton", cu_seqlens=bounds)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(inputs, backend="triton", cu_seqlens=bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again))
