"""Several linear layers of one input."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

NARROW = 512  # outputs: a layer of fewer reads its input for little work, and shares the reading with others


def project(x: torch.Tensor, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """What linear layers without bias make of x (..., D): (..., N) each, those of narrow layers views of one tensor.

    The gradient of x is summed by the matrix products themselves: autograd would take one more pass over memory for
    each layer but the first. Compilers do as well, and DeepSpeed's stage 3 wants them to see the layers.
    """
    if torch.compiler.is_compiling():
        return tuple(layer(x) for layer in layers)
    narrow = [layer.out_features < NARROW for layer in layers]
    weights = [layer.weight for layer in layers]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    products = [w for w, together in zip(weights, narrow) if not together]
    beside = [w for w, together in zip(weights, narrow) if together]
    if beside:
        products.append(torch.cat(beside))
    outputs = list(_Projections.apply(x, *products))
    parts = iter(outputs.pop().split([len(w) for w in beside], dim=-1) if beside else ())
    return tuple(next(parts) if together else outputs.pop(0) for together in narrow)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, by_x = x.flatten(0, -2), None
        by_weights: list[torch.Tensor | None] = []
        for grad, weight, needed in zip(grads, weights, ctx.needs_input_grad[1:]):
            if grad is None:
                by_weights.append(None)
                continue
            grad = grad.flatten(0, -2)
            by_weights.append(grad.T @ rows if needed else None)
            if ctx.needs_input_grad[0]:
                by_x = grad @ weight if by_x is None else by_x.addmm_(grad, weight)
        return None if by_x is None else by_x.view(x.shape), *by_weights
