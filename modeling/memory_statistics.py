"""What the neural memories of a model did in training since they were last asked: sums on the device, read when taken.

Means over layers, heads and calls, by which such models are debugged:

    memory_loss           ‖f(W; k) − v‖² / ‖v‖² of each row's last tokens, up to `RECENT`, by the memory after them
    memory_loss_before    the same by the memory that the sequence began with
    memory_norm           ‖W‖ / ‖W before the sequence‖ after the row
    memory_update         ‖W − W before‖ / ‖W before‖
    memory_alpha, memory_theta, memory_eta    what is forgotten, the step, what is kept of the momentum
    memory_fast           share of tokens that forget more than a tenth

To note them takes passes over all states and dozens of small kernels a layer: see `noting`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from riverrun.kernels.neural_memory import Gates, MemoryState, Rule, read_memory
from riverrun.modeling.statistics import note

RECENT = 64
FAST = 0.1

_wanted = True


@contextmanager
def noting(wanted: bool) -> Iterator[None]:
    """Whether forward passes meanwhile are to note: training asks for it in the steps that it records."""
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def is_wanted(module: nn.Module) -> bool:
    """Of a memory: it is trained, and somebody will ask."""
    return _wanted and module.training and torch.is_grad_enabled()


@torch.no_grad()
def note_gates(gates: tuple[Gates, ...]) -> None:
    for layer in gates[:1] if all(g is gates[0] for g in gates) else gates:
        alpha = -torch.expm1(layer.log_keep)
        note("memory_alpha", _mean(alpha))
        note("memory_fast", _mean(alpha > FAST))
        note("memory_theta", _mean(layer.lr))
        if layer.log_momentum is not None:
            note("memory_eta", _mean(layer.log_momentum.exp()))


@torch.no_grad()
def note_memory(
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    before: MemoryState,
    after: MemoryState,
    rule: Rule,
    norm_weight: torch.Tensor | None,
) -> None:
    """Of the last tokens of each row, k (B, t, H, K) and v (B, t, H, V), of which `valid` (B, t) are of the sequence
    that has the states (B, …)."""
    v = v.float()

    def total(x: torch.Tensor) -> torch.Tensor:
        squares = x.square() if valid is None else x.square() * valid[..., None, None]
        return squares.sum(dtype=torch.float64)

    squares = total(v)
    for name, state in (("memory_loss", after), ("memory_loss_before", before)):
        error = read_memory(k, state, rule=rule, norm_weight=norm_weight).float() - v
        note(name, total(error), squares)
    for start, end in zip(before.weights, after.weights):
        norm = start.norm(dim=(-2, -1)).clamp_min(1e-12)
        note("memory_norm", _mean(end.norm(dim=(-2, -1)) / norm))
        note("memory_update", _mean((end - start).norm(dim=(-2, -1)) / norm))


def _mean(x: torch.Tensor) -> torch.Tensor:
    """In the type that is noted: no pass for that alone."""
    return x.mean(dtype=torch.float64)
