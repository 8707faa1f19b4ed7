"""What a neural memory learns by, and what it keeps: the gates and the state that all forms of the op share."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from riverrun.kernels.common.memory_rule import Rule

Weights = tuple[torch.Tensor, ...]


class Gates(NamedTuple):
    """Of one layer, or of all: (B, T, H), or (B, T, H, out) for every output of the layer alone.

    Attributes:
        log_keep: log(1 − α) ≤ 0, what is kept of the weights.
        lr: θ ≥ 0, the size of the step.
        log_momentum: log η ≤ 0, what is kept of the momentum; None: there is none.
    """

    log_keep: torch.Tensor
    lr: torch.Tensor
    log_momentum: torch.Tensor | None = None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Gates":
        """Of all that there are."""
        momentum = None if self.log_momentum is None else function(self.log_momentum)
        return Gates(function(self.log_keep), function(self.lr), momentum)


class MemoryState(NamedTuple):
    """Of S sequences after their last tokens, in float32 (float64 if the inputs are).

    Attributes:
        weights: per layer the accumulators (S, H, in, out), which are the weights where retention is "none".
        momentum: per layer (S, H, in, out), or None.
        anchor: per layer the accumulators at the start of the chunk that the next token belongs to; None for chunks of
            one token.
        pending: per layer (S, H) what the open chunk's orthogonal update will count; None without such updates.
        past: keys (S, c − 1, H, K), values (S, c − 1, H, V) and window weights (S, c − 1, H) of the last tokens, zeros
            where there were none; None for a window of one.
    """

    weights: Weights
    momentum: Weights | None = None
    anchor: Weights | None = None
    pending: Weights | None = None
    past: tuple[torch.Tensor, ...] | None = None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MemoryState":
        """Of all tensors that there are."""
        return MemoryState(*(None if part is None else tuple(map(function, part)) for part in self))  # type: ignore[arg-type]


def fresh_state(weights: Weights, sequences: int, rule: Rule, momentum: bool, V: int) -> MemoryState:
    """Before the first token, of learned weights (H, in, out)."""
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    start = tuple(w.to(dtype).expand(sequences, *w.shape) for w in weights)
    past = None
    if rule.window > 1:
        H, K = weights[0].shape[:2]
        keys, values = (start[0].new_zeros(sequences, rule.window - 1, H, size) for size in (K, V))
        past = keys, values, start[0].new_zeros(sequences, rule.window - 1, H)
    still = tuple(torch.zeros_like(w) for w in start) if momentum else None
    pending = tuple(w.new_zeros(w.shape[:2]) for w in start) if rule.newton_schulz else None
    return MemoryState(start, still, start if rule.chunk_size > 1 else None, pending, past)
