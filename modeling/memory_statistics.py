"""What the neural memories of a model did in training since they were last asked: sums on the device, read when taken.

Means over layers, heads and calls, by which such models are debugged:

    memory_loss           ‖f(W; k) − v‖² / ‖v‖² of each row's last tokens, up to `RECENT`, by the memory after them
    memory_loss_before    the same by the memory that the sequence began with
    memory_norm           ‖W‖ / ‖W before the sequence‖ after the row
    memory_update         ‖W − W before‖ / ‖W before‖
    memory_alpha, memory_theta, memory_eta    what is forgotten, the step, what is kept of the momentum
    memory_fast           share of tokens that forget more than a tenth
"""

import torch

from riverrun.kernels.neural_memory import Gates, MemoryState, Rule, read_memory
from riverrun.modeling.statistics import note

RECENT = 64
FAST = 0.1


@torch.no_grad()
def note_gates(gates: tuple[Gates, ...]) -> None:
    for layer in gates[:1] if all(g is gates[0] for g in gates) else gates:
        alpha = -torch.expm1(layer.log_keep)
        note("memory_alpha", alpha.mean())
        note("memory_fast", (alpha > FAST).float().mean())
        note("memory_theta", layer.lr.mean())
        if layer.log_momentum is not None:
            note("memory_eta", layer.log_momentum.exp().mean())


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
    counted = 1.0 if valid is None else valid[..., None, None].float()
    squares = (v.float().square() * counted).sum()
    for name, state in (("memory_loss", after), ("memory_loss_before", before)):
        error = read_memory(k, state, rule=rule, norm_weight=norm_weight).float() - v.float()
        note(name, (error.square() * counted).sum(), squares)
    for start, end in zip(before.weights, after.weights):
        norm = start.norm(dim=(-2, -1)).clamp_min(1e-12)
        note("memory_norm", (end.norm(dim=(-2, -1)) / norm).mean())
        note("memory_update", ((end - start).norm(dim=(-2, -1)) / norm).mean())
