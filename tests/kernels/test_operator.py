"""Operators on their way around torch's dispatcher, and through it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from riverrun.kernels.common.operator import operator

calls: list[str] = []


@operator("test_scaled")
def scaled(x: torch.Tensor, weight: torch.Tensor | None, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    calls.append("autocast" if torch.is_autocast_enabled("cpu") else "plain")
    y = factor * x
    return y if weight is None else y * weight, x.sum(-1)


@scaled.register_fake
def _(x, weight, factor):
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


def setup_context(ctx, inputs, output):
    x, weight, ctx.factor = inputs
    calls.append("setup")
    ctx.save_for_backward(x, weight)


def gradient(ctx, grad, grad_sum):
    x, weight = ctx.saved_tensors
    of_weight = None if weight is None else (grad * ctx.factor * x).sum(0)
    return grad * ctx.factor * (1 if weight is None else weight) + grad_sum[..., None], of_weight, None


scaled.register_autograd(gradient, setup_context=setup_context)


@pytest.fixture(autouse=True)
def nothing_called():
    calls.clear()


def leaves():
    return torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)


def of(call, x, weight):
    y, total = call(x, weight, 2.0)
    return y, total, *torch.autograd.grad((y * y).sum() + total.sum(), [x, weight])


def test_eager_traced_and_compiled_agree():
    x, weight = leaves()
    want = of(lambda x, weight, factor: (factor * x * weight, x.sum(-1)), x, weight)
    compiled = torch.compile(lambda *args: scaled(*args), fullgraph=True, backend="aot_eager")
    with FlopCounterMode(display=False):
        traced = of(scaled, x, weight)
    for got in (of(scaled, x, weight), of(compiled, x, weight), traced):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_profiles_name_it():
    x, weight = leaves()
    with torch.profiler.profile() as profiler:
        scaled(x, weight, 2.0)
    assert any(event.key == "test_scaled" for event in profiler.key_averages())


@pytest.mark.parametrize("how", ["no grad", "no leaf"])
def test_nothing_is_kept_where_no_gradient_is_wanted(how):
    x, weight = leaves()
    if how == "no leaf":
        y, _ = scaled(x.detach(), None, 2.0)
    else:
        with torch.no_grad():
            y, _ = scaled(x, weight, 2.0)
    assert not y.requires_grad and calls == ["plain"]


@pytest.mark.parametrize("wanted", [True, False])
def test_autocast_does_not_reach_inside(wanted):
    x, weight = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(wanted):
        scaled(x, weight, 2.0)
    assert calls[0] == "plain"


def test_second_derivatives_are_refused():
    x, weight = leaves()
    y, _ = scaled(x, weight, 2.0)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
