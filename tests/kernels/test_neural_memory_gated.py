"""The gated hidden layer of a memory: its fused gradients, and theirs, run by Triton's interpreter."""

from pathlib import Path

import pytest
import torch
from compiling import CARDS

from riverrun.kernels.neural_memory import gated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(gated, "fused", lambda a: a.dtype != torch.float64)


def everything(dtype, activation, size):
    generator = torch.Generator().manual_seed(0)
    a, c, grad, *upstream = (torch.randn(size, generator=generator).mul(2).to(DEVICE, dtype) for _ in range(6))
    leaves = [x.requires_grad_() for x in (a, c, grad)]
    h = gated.gated(a, c, activation)
    first = torch.autograd.grad(h, [a, c], upstream[0], create_graph=True)
    of_a, of_c = gated.gated_gradients(grad, a, c, activation)
    second = torch.autograd.grad([of_a, of_c], leaves, upstream[1:])
    third = torch.autograd.grad(first, [a, c], upstream[1:])  # through the backward pass of the first
    return [h, *first, of_a, of_c, *second, *third]


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 700)])
def test_gradients_of_gradients(anywhere, activation, size):
    for got, want in zip(everything(torch.float32, activation, size), everything(torch.float64, activation, size)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_slopes_are_derivatives(activation):
    z = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(gated.activate(z, activation).sum(), z)
    torch.testing.assert_close(gated.slope(z, activation), want)


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_without_spilling(card):
    compiler, _ = CARDS[card]
    kernels = compiler(Path(__file__).with_name("launches_neural_memory_gated.py"))
    assert {k["kernel"] for k in kernels} == {"gated_kernel", "gradients_kernel", "second_kernel"}
    assert all(k["stack"] == 0 for k in kernels)
