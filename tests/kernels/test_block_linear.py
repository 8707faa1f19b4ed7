"""block_linear against a sum over single heads."""

import pytest
import torch

from riverrun.kernels.block_linear import block_linear


@pytest.mark.parametrize("B, T, H, I, G, J", [(2, 5, 3, 4, 3, 6), (1, 1, 1, 2, 4, 3)])
def test_is_one_linear_map_a_head_and_gate(B, T, H, I, G, J):
    x = torch.randn(B, T, H * I, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(H, I, G, J, dtype=torch.float64, requires_grad=True)
    heads = x.unflatten(-1, (H, I)).unbind(2)
    want = torch.stack([torch.cat([heads[h] @ weight[h, :, g] for h in range(H)], -1) for g in range(G)], 2)
    got = block_linear(x, weight)
    torch.testing.assert_close(got, want)
    assert got.is_contiguous()
    upstream = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(y, [x, weight], upstream) for y in (got, want)))


def test_upstream_gradients_in_any_layout():
    x, weight = torch.randn(1, 4, 6, dtype=torch.float64), torch.randn(2, 3, 2, 5, dtype=torch.float64)
    upstream = torch.randn(1, 10, 2, 4, dtype=torch.float64).permute(0, 3, 2, 1)
    for part in (x, weight):
        part.requires_grad_()
    y = block_linear(x, weight)
    strided = torch.autograd.grad(y, [x, weight], upstream, retain_graph=True)
    torch.testing.assert_close(strided, torch.autograd.grad(y, [x, weight], upstream.contiguous()))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weight must have shape \(H, I, G, J\)"):
        block_linear(torch.zeros(1, 2, 6), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="x must have shape"):
        block_linear(torch.zeros(1, 2, 7), torch.zeros(2, 3, 4, 5))
