"""The cells of `head_rnn` in torch: one step forward, and one step back.

A state is a tuple of tensors that ends with h; `u` and `rec` are the pre-activations of the gates from the input and
from the recurrence, G each. A step back turns the gradients of the new state into those of `u`, of `rec` and of the old
state, the last without what flows back through `rec`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """`gates` and `states` name them in their order."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    step: Callable[[Tensors, Tensors, Tensors], Tensors]
    back: Callable[[Tensors, Tensors, Tensors, Tensors], tuple[Tensors, Tensors, Tensors]]


def lstm_step(state: Tensors, u: Tensors, rec: Tensors) -> Tensors:
    i, f, z, o = (x + y for x, y in zip(u, rec))
    c = f.sigmoid() * state[0] + i.sigmoid() * z.tanh()
    return c, o.sigmoid() * c.tanh()


def lstm_back(state: Tensors, u: Tensors, rec: Tensors, grad: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    i, f, z, o = (x + y for x, y in zip(u, rec))
    i, f, z, o = i.sigmoid(), f.sigmoid(), z.tanh(), o.sigmoid()
    tanh_c = (f * state[0] + i * z).tanh()
    grad_c = grad[0] + grad[1] * o * (1 - tanh_c * tanh_c)
    by_u = (
        grad_c * z * i * (1 - i),
        grad_c * state[0] * f * (1 - f),
        grad_c * i * (1 - z * z),
        grad[1] * tanh_c * o * (1 - o),
    )
    return by_u, by_u, (grad_c * f, torch.zeros_like(i))


def _slstm(state: Tensors, u: Tensors, rec: Tensors) -> Tensors:
    c, n, m, _ = state
    i, f, z, o = (x + y for x, y in zip(u, rec))
    log_f = F.logsigmoid(f) + m
    from_i = (n == 0) | (i >= log_f)
    new_m = torch.where(from_i, i, log_f)
    # nothing is kept of a state that holds nothing: its m says nothing either, and the exponential might overflow
    keep = torch.where(n == 0, 0, torch.where(n == 0, 0, log_f - new_m).exp())
    add = (i - new_m).exp()
    z = z.tanh()
    return keep, add, z, o.sigmoid(), keep * c + add * z, keep * n + add, new_m, from_i


def slstm_step(state: Tensors, u: Tensors, rec: Tensors) -> Tensors:
    _, _, _, o, c, n, m, _ = _slstm(state, u, rec)
    n = n.clamp_min(1)
    return c, n, m, o * (c / n)


def slstm_back(state: Tensors, u: Tensors, rec: Tensors, grad: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    keep, add, z, o, c, free_n, _, from_i = _slstm(state, u, rec)
    n = free_n.clamp_min(1)
    ratio = c / n
    grad_c = grad[0] + grad[3] * o / n
    grad_n = torch.where(free_n >= 1, grad[1] - grad[3] * o * ratio / n, 0)
    grad_keep = (grad_c * state[0] + grad_n * state[1]) * keep
    grad_add = (grad_c * z + grad_n) * add
    grad_m = grad[2] - grad_keep - grad_add
    grad_i = grad_add + torch.where(from_i, grad_m, 0)
    grad_log_f = grad_keep + torch.where(from_i, 0, grad_m)
    by_u = (
        grad_i,
        grad_log_f * (-u[1] - rec[1]).sigmoid(),
        grad_c * add * (1 - z * z),
        grad[3] * ratio * o * (1 - o),
    )
    return by_u, by_u, (grad_c * keep, grad_n * keep, grad_log_f, torch.zeros_like(o))


def gru_step(state: Tensors, u: Tensors, rec: Tensors) -> Tensors:
    r, z = (u[0] + rec[0]).sigmoid(), (u[1] + rec[1]).sigmoid()
    n = (u[2] + r * rec[2]).tanh()
    return (n + z * (state[0] - n),)


def gru_back(state: Tensors, u: Tensors, rec: Tensors, grad: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    r, z = (u[0] + rec[0]).sigmoid(), (u[1] + rec[1]).sigmoid()
    n = (u[2] + r * rec[2]).tanh()
    grad_n = grad[0] * (1 - z) * (1 - n * n)
    grad_r = grad_n * rec[2] * r * (1 - r)
    grad_z = grad[0] * (state[0] - n) * z * (1 - z)
    return (grad_r, grad_z, grad_n), (grad_r, grad_z, grad_n * r), (grad[0] * z,)


def elman_step(state: Tensors, u: Tensors, rec: Tensors) -> Tensors:
    return ((u[0] + rec[0]).tanh(),)


def elman_back(state: Tensors, u: Tensors, rec: Tensors, grad: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    h = (u[0] + rec[0]).tanh()
    by_u = (grad[0] * (1 - h * h),)
    return by_u, by_u, (torch.zeros_like(h),)


CELLS = {
    "lstm": Cell(("i", "f", "z", "o"), ("c", "h"), lstm_step, lstm_back),
    "slstm": Cell(("i", "f", "z", "o"), ("c", "n", "m", "h"), slstm_step, slstm_back),
    "gru": Cell(("r", "z", "n"), ("h",), gru_step, gru_back),
    "elman": Cell(("z",), ("h",), elman_step, elman_back),
}
