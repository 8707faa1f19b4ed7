"""gated_rms_norm against its formula written out, in float64."""

import pytest
import torch

from riverrun.kernels.gated_rms_norm import gated_rms_norm


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
