"""What caps a memory's steps, its curvature as it starts, beside the Gauss-Newton matrix."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from riverrun.kernels.common.memory_rule import curvature

SHAPES = {
    "linear": ([(64, 64)], False),
    "two layers": ([(64, 256), (256, 64)], False),
    "narrow values": ([(128, 128), (128, 32)], False),
    "three layers": ([(64, 128), (128, 128), (128, 64)], False),
    "gated": ([(64, 128), (64, 128), (128, 64)], True),
}


def largest_eigenvalue(sizes, norm, gated):
    """Of Σ (∂f/∂W)(∂f/∂W)ᵀ for random weights and a random key of unit length, on average."""
    found = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        key = F.normalize(randn(sizes[0][0]), dim=0)
        weights = tuple(randn(*size) * size[0] ** -0.5 for size in sizes)

        def read(*W, key=key):
            x = key
            if gated:
                x, W = F.silu(x @ W[0]) * (x @ W[1]), W[2:]
            for i, w in enumerate(W):
                x = F.gelu(x @ w) if i < len(W) - 1 else x @ w
            return F.layer_norm(x, x.shape) * len(x) ** -0.5 if norm else x

        jacobian = torch.cat([j.flatten(1) for j in torch.autograd.functional.jacobian(read, weights)], dim=1)
        found.append(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1])
    return torch.stack(found).mean().item()


@pytest.mark.parametrize(
    "name, norm", [("linear", False), *((name, n) for name in list(SHAPES)[1:] for n in (False, True))]
)
def test_is_the_gauss_newton_matrix_largest_eigenvalue_or_one_a_layer(name, norm):
    sizes, gated = SHAPES[name]
    if not norm:
        assert curvature(sizes, norm, gated) == len(sizes) >= 0.9 * largest_eigenvalue(sizes, norm, gated)
        return
    assert 0.5 < curvature(sizes, norm, gated) / largest_eigenvalue(sizes, norm, gated) < 2.2
