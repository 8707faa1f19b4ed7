"""What caps a memory's steps, its curvature as it starts, beside the Gauss-Newton matrix."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from riverrun.kernels.common.memory_rule import NORM_EPS, curvature

SHAPES = {
    "linear": ([(64, 64)], False),
    "two layers": ([(64, 256), (256, 64)], False),
    "narrow values": ([(128, 128), (128, 32)], False),
    "three layers": ([(64, 128), (128, 128), (128, 64)], False),
    "gated": ([(64, 128), (64, 128), (128, 64)], True),
}


def largest_eigenvalue(sizes, norm, gated, left=(1.0, 1.0)):
    """Of Σ (∂f/∂W)(∂f/∂W)ᵀ for random weights, of which so much is left in the last layer and those before it, and a
    random key of unit length, on average."""
    found = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        key = F.normalize(randn(sizes[0][0]), dim=0)
        last, before = left
        weights = [randn(*size) * size[0] ** -0.5 * before for size in sizes]
        weights = (*weights[:-1], weights[-1] / before * last)

        def read(*W, key=key):
            x = key
            if gated:
                x, W = F.silu(x @ W[0]) * (x @ W[1]), W[2:]
            for i, w in enumerate(W):
                x = F.gelu(x @ w) if i < len(W) - 1 else x @ w
            return F.layer_norm(x, x.shape, eps=NORM_EPS) * len(x) ** -0.5 if norm else x

        jacobian = torch.cat([j.flatten(1) for j in torch.autograd.functional.jacobian(read, weights)], dim=1)
        found.append(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1])
    return torch.stack(found).mean().item()


@pytest.mark.parametrize("name", SHAPES)
def test_is_one_a_layer_without_a_norm_no_less_than_the_gauss_newton_matrixs_largest_eigenvalue(name):
    sizes, gated = SHAPES[name]
    assert curvature(sizes, False, gated) == len(sizes) >= 0.9 * largest_eigenvalue(sizes, False, gated)


@pytest.mark.parametrize("name", list(SHAPES)[1:])
def test_with_a_norm_is_the_largest_eigenvalue_whatever_forgetting_leaves(name):
    """A norm without ε would have none that is largest: the less is left, the more it magnifies."""
    sizes, gated = SHAPES[name]
    shares = [(last, before) for last in (1, 0.5, 0.1, 0.01) for before in (1, 0.5, 0.1)]
    largest = max(largest_eigenvalue(sizes, True, gated, left) for left in shares)
    found = curvature(sizes, True, gated)
    assert 0.9 * largest <= found and (found < 2.2 * largest or found == len(sizes))
