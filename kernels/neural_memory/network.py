"""The memory as a network: reading it, and the gradients of its inner loss with respect to each layer's outputs.

A layer's gradient is the outer product of its input and that, so no form of the op ever holds one gradient a token.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from riverrun.kernels.common.memory_rule import NORM_EPS, Rule
from riverrun.kernels.neural_memory.gated import activate, gated, gated_gradients, slope
from riverrun.kernels.neural_memory.rule import Weights

EPS = 1e-6  # of where |e| is smooth
Apply = Callable[[int, torch.Tensor], torch.Tensor]


def read(rule: Rule, num_layers: int, x: torch.Tensor, norm_weight: torch.Tensor | None, apply: Apply) -> torch.Tensor:
    """f(x) (…, H, b, V) of x (…, H, b, K), whose layer l takes its inputs to `apply(l, inputs)`; norm_weight (H, V)."""
    return _output(rule, x, apply(num_layers - 1, _hidden(rule, num_layers, x, apply)[-1]), norm_weight)


def learn(
    rule: Rule,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: Weights,
    norm_weight: torch.Tensor | None,
    delta: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per layer, its inputs (…, H, b, in), and the inner loss's gradient of its outputs (…, H, b, out), at k
    (…, H, b, K) and v (…, H, b, V); delta (…, H, b) of the bias "huber"."""
    before: list[torch.Tensor] = []

    def apply(layer: int, x: torch.Tensor) -> torch.Tensor:
        before.append(product(x, weights[layer]))
        return before[-1]

    inputs = _hidden(rule, len(weights), k, apply)
    u = apply(len(weights) - 1, inputs[-1])
    gradient = residual_gradient(rule, _output(rule, k, u, norm_weight), v, delta)
    if norm_weight is not None:
        gradient = _norm_gradient(u, gradient * norm_weight.to(u.dtype)[:, None])
    if rule.gated:
        gate, up = before[:2]
        back = product(gradient, weights[2].mT)
        return inputs, [*gated_gradients(back, gate, up, rule.activation), gradient]
    gradients = [gradient]
    for layer in reversed(range(len(weights) - 1)):
        gradients.append(product(gradients[-1], weights[layer + 1].mT) * slope(before[layer], rule.activation))
    return inputs, gradients[::-1]


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of the inputs' type, whatever the weights'."""
    return x @ weight.to(x.dtype)


def residual_gradient(rule: Rule, f: torch.Tensor, v: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
    """Of the inner loss with respect to f (…, V)."""
    if rule.bias == "dot":
        return -v
    e = f - v
    if rule.bias == "lp":
        return e * (e.square() + EPS) ** (rule.p / 2 - 1)
    if rule.bias == "huber":
        assert delta is not None
        return e.clamp(-delta[..., None], delta[..., None])
    return e


def weights_of(rule: Rule, accumulators: Weights) -> Weights:
    """What a memory computes with, by its retention."""
    if rule.retention == "softmax":
        return tuple(a.softmax(-2) for a in accumulators)
    if rule.retention == "none":
        return accumulators
    return tuple(a * s for a, s in zip(accumulators, scales(rule, accumulators), strict=True))


def scales(rule: Rule, accumulators: Weights) -> tuple[torch.Tensor | float, ...]:
    """1 / ‖A‖_q^(q−2) per layer (…, 1, 1), or 1."""
    if rule.retention != "lq":
        return (1.0,) * len(accumulators)
    return tuple((a.abs() ** rule.q).sum((-2, -1), keepdim=True) ** (2 / rule.q - 1) for a in accumulators)


def orthogonalise(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton–Schulz iterations that drive the singular values of x (…, m, n) towards one (Muon; ATLAS, eq. 34)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x.mT if tall else x


def _hidden(rule: Rule, num_layers: int, x: torch.Tensor, apply: Apply) -> list[torch.Tensor]:
    """The inputs of all layers; the last layer is left to be applied."""
    if rule.gated:
        return [x, x, gated(apply(0, x), apply(1, x), rule.activation)]
    inputs = [x]
    for layer in range(num_layers - 1):
        inputs.append(activate(apply(layer, inputs[-1]), rule.activation))
    return inputs


def _output(rule: Rule, x: torch.Tensor, u: torch.Tensor, norm_weight: torch.Tensor | None) -> torch.Tensor:
    if norm_weight is not None:
        u = F.layer_norm(u, u.shape[-1:], eps=NORM_EPS) * norm_weight.to(u.dtype)[:, None]
    return x + u if rule.residual else u


def _norm_gradient(u: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """From that of the normalised u, without gain, that of u."""
    centred = u - u.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    unit = centred * inverse
    gradient = gradient - gradient.mean(-1, keepdim=True) - unit * (gradient * unit).mean(-1, keepdim=True)
    return inverse * gradient
