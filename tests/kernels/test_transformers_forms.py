"""Our kernels against the torch forms in transformers of the layers that they replace. (The gated delta rule's, which
Qwen3-Next and OLMo-Hybrid share, is in `test_gated_delta_triton.py`.)"""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.kernels.ssd import ssd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, P, G, N = 2, 45, 4, 16, 2, 16

every_backend = pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])


def ssd_inputs():
    """x, dt, A, B, C, D, the initial state; dt after its softplus."""
    inputs = [torch.randn(B, T, H, P), torch.randn(B, T, H).exp() / 4, -torch.rand(H) * 4 - 0.1]
    inputs += [torch.randn(B, T, G, N) / 4, torch.randn(B, T, G, N), torch.randn(H), torch.randn(B, H, P, N)]
    return [x.to(DEVICE).requires_grad_() for x in inputs]


def with_gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def assert_close(got, want, tolerance=2e-5):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()


@every_backend
def test_ssd_is_masked_attention(backend):
    """Y = (L ∘ C Bᵀ) Δx with log L = `segment_sum` of Δ A: the dual form."""
    *inputs, _, _ = ssd_inputs()
    x, dt, A, keys, queries = inputs
    L = modeling_mamba2.segment_sum((dt * A).transpose(1, 2)).exp()  # (B, H, T, T)
    wide = [t.repeat_interleave(H // G, dim=2) for t in (keys, queries)]
    y = torch.einsum("bhts,bthn,bshn,bsh,bshp->bthp", L, wide[1], wide[0], dt, x)
    got = ssd(x, dt, A, keys, queries, backend=backend)[0]
    assert_close(with_gradients([got], inputs), with_gradients([y], inputs))


@every_backend
def test_ssd_equals_the_chunked_scan(backend):
    scan = getattr(modeling_mamba2, "mamba2_chunk_scan", None)
    if scan is None:
        pytest.skip("this version of transformers has the scan in the middle of its mixer")
    inputs = ssd_inputs()
    x, dt, A, keys, queries, D, state = inputs
    want = scan(x, dt, A, keys, queries, 16, D=D, initial_states=state, return_final_states=True)
    got = ssd(x, dt, A, keys, queries, D, initial_state=state, backend=backend)
    assert_close(with_gradients(got, inputs), with_gradients(want, inputs))


@every_backend
def test_the_whole_mixer_from_our_kernels(backend):
    config = Mamba2Config(
        hidden_size=32, expand=2, num_heads=H, head_dim=P, n_groups=G, state_size=N, chunk_size=16, conv_kernel=4,
        num_hidden_layers=1,
    )  # fmt: skip
    mixer = modeling_mamba2.Mamba2Mixer(config, layer_idx=0).to(DEVICE)
    with torch.no_grad():
        mixer.norm.weight.normal_()
        mixer.D.normal_()
    hidden = torch.randn(B, T, 32, device=DEVICE).requires_grad_()
    leaves = [hidden, *(p for name, p in mixer.named_parameters() if p.requires_grad)]

    gate, convolved, dt = mixer.in_proj(hidden).split([H * P, H * P + 2 * G * N, H], dim=-1)
    convolved, _ = causal_conv1d(
        convolved, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, activation="silu", backend=backend
    )
    x, keys, queries = convolved.split([H * P, G * N, G * N], dim=-1)
    y, _ = ssd(
        x.unflatten(-1, (H, P)), F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp(), keys.unflatten(-1, (G, N)),
        queries.unflatten(-1, (G, N)), mixer.D, backend=backend,
    )  # fmt: skip
    eps = config.layer_norm_epsilon
    y = gated_rms_norm(y.flatten(2), gate, mixer.norm.weight, eps=eps, groups=G, backend=backend)
    assert_close(with_gradients([mixer.out_proj(y)], leaves), with_gradients([mixer(hidden)], leaves))
