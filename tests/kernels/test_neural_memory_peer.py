"""neural_memory against titans-pytorch, another writing of it, at settings where the two mean the same."""

import pytest
import torch
from titans_pytorch import NeuralMemory
from titans_pytorch.memory_models import MemoryMLP
from torch.nn import functional as F

from riverrun.kernels.common.memory_rule import NORM_EPS
from riverrun.kernels.neural_memory import Gates, Rule, neural_memory

D, T, MAX_LR = 6, 12, 0.3


class Normed(MemoryMLP):
    """x + LN(MLP(x)), whose norm has no weights that would learn with the memory."""

    def forward(self, x):
        return x + F.layer_norm(super().forward(x), x.shape[-1:], eps=NORM_EPS)


class Linear(MemoryMLP):
    def __init__(self):
        super().__init__(D, depth=1)


@pytest.mark.parametrize("anchored", [1, 4, None])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_memory_is_titans_pytorchs(norm, momentum, anchored):
    """`batch_size` there is the tokens whose gradients are taken at the same weights: all of a call's if None."""
    torch.manual_seed(0)
    peer = NeuralMemory(
        D, chunk_size=1, batch_size=anchored, momentum=momentum, pre_rmsnorm=False, mem_model_norm_add_residual=False,
        model=Normed(D, depth=2, expansion_factor=2.0) if norm else Linear(), default_step_transform_max_lr=MAX_LR,
        store_memory_loss_fn=lambda f, v: (f - v).square().sum(-1) / 2,
    ).double()  # fmt: skip
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    expected, _ = peer(x)

    q, k, v = (layer(x)[:, :, None] for layer in (peer.to_queries, peer.to_keys, peer.to_values))

    def gate(layer):
        return layer[0](x)  # (B, T, 1)

    gates = Gates(
        F.logsigmoid(-gate(peer.to_decay_factor)),
        MAX_LR * gate(peer.to_adaptive_step).sigmoid(),
        F.logsigmoid(gate(peer.to_momentum)) if momentum else None,
    )
    weights = tuple(peer.memory_model_parameters)
    rule = Rule(chunk_size=anchored or T, residual=norm)
    o, _ = neural_memory(
        q, k, v, weights, gates, rule=rule, norm_weight=torch.ones(1, D, dtype=torch.float64) if norm else None
    )
    torch.testing.assert_close(o[:, :, 0], expected, rtol=1e-9, atol=1e-9)

    upstream = torch.randn(expected.shape, dtype=torch.float64)
    inputs = [x, *weights]
    got, want = (torch.autograd.grad((y * upstream).sum(), inputs) for y in (o[:, :, 0], expected))
    for g, w in zip(got, want):
        assert (g - w).norm() < 1e-8 * w.norm()
