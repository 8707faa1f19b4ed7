"""Several linear layers of one input, against the layers one by one."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from riverrun.modeling import projection
from riverrun.modeling.projection import project


@pytest.fixture(autouse=True, params=[0, 4, 512], ids=["all wide", "two narrow", "all narrow"])
def narrow(request, monkeypatch):
    monkeypatch.setattr(projection, "NARROW", request.param)


def make(dtype=torch.float64):
    return torch.randn(2, 5, 8, dtype=dtype), [nn.Linear(8, n, bias=False, dtype=dtype) for n in (6, 1, 3)]


def outcome(function, x, layers, used=(0, 1, 2)):
    """Outputs, and the gradients of the input and of the weights of a loss of the outputs `used`."""
    x = x.detach().requires_grad_()
    outputs = function(x, *layers)
    leaves = [x, *(layer.weight for layer in layers if layer.weight.requires_grad)]
    loss = sum(outputs[i].float().square().sum() for i in used)
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def one_by_one(x, *layers):
    return tuple(layer(x) for layer in layers)


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (2, 0)])
def test_equals_layers_one_by_one(used):
    x, layers = make()
    assert_close(outcome(project, x, layers, used), outcome(one_by_one, x, layers, used))


def test_a_frozen_weight_and_an_input_without_gradient():
    x, layers = make()
    layers[1].weight.requires_grad_(False)
    assert_close(outcome(project, x, layers), outcome(one_by_one, x, layers))
    sum(y.sum() for y in project(x, *layers)).backward()
    assert x.grad is None and layers[0].weight.grad is not None and layers[1].weight.grad is None


def test_recompute():
    x, layers = make()

    def again(x, *layers):
        return checkpoint(project, x, *layers, use_reentrant=False)

    assert_close(outcome(again, x, layers), outcome(one_by_one, x, layers))


def test_autocast():
    x, layers = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (outcome(f, x, layers) for f in (project, one_by_one))
    assert got[0].dtype == torch.bfloat16 and got[3].dtype == got[4].dtype == torch.float32
    assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_compiles_without_a_graph_break():
    x, layers = make(torch.float32)
    assert_close(outcome(torch.compile(project, fullgraph=True), x, layers), outcome(one_by_one, x, layers))
