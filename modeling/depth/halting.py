"""Adaptive computation time (Graves 2016, arXiv 1603.08983): every position decides how many steps it takes.

In the form of the Universal Transformer (arXiv 1807.03819, section 2.2). Before step t a position's state x_t, its
embedding of place and step included, gives the probability to halt

    p_t = σ(w · x_t + b).

With Π the sum of its probabilities so far, it goes on while Π + p_t ≤ 1 − ε, and step t has weight p_t. At the first
step where the sum is larger it halts, and that step has the rest as its weight, R = 1 − Π. N is the number of steps.
The weights sum to one; N + R, of which R has a gradient, is what pondering costs.

Where the sources differ or are silent:
- The probability is of the state before the step, as in the authors' code; Graves has it after the step.
- A position that still runs at the last step halts there: its weight is the remainder, so that weights always sum to
  one, as Graves has it. The authors' code leaves the sum short.
- What comes out is Σ_t weight_t · s_t over the states s_t after each step: Graves's mean field, "accumulated" in the
  authors' code. By default that code has new = weight · s_t + (1 − weight) · old, where an early step counts for less
  than its weight, by what all later ones take.
- ε is 0.01, b starts at 1; w starts like any weight.
"""

from typing import NamedTuple

import torch
from torch import nn


class Progress(NamedTuple):
    """How far positions are, (…) each.

    Attributes:
        total: Π.
        running: which have not halted.
        steps: N so far.
        remainder: R of those that halted, 0 of the others.
    """

    total: torch.Tensor
    running: torch.Tensor
    steps: torch.Tensor
    remainder: torch.Tensor

    @classmethod
    def start(cls, like: torch.Tensor) -> "Progress":
        """Before the first step, of positions (…) like these."""
        zero = torch.zeros_like(like)
        return cls(zero, torch.ones_like(like, dtype=torch.bool), zero, zero)

    @property
    def cost(self) -> torch.Tensor:
        """N + R."""
        return self.steps + self.remainder

    def step(self, p: torch.Tensor, epsilon: float, last: bool) -> tuple[torch.Tensor, "Progress"]:
        """The weight of one more step, 0 where a position has halted before, and the progress after it.

        Args:
            p: (…) halting probabilities.
            last: there is no step after this one.
        """
        beyond = self.total + p > 1 - epsilon
        halts = self.running if last else self.running & beyond
        goes_on = self.running & ~halts
        rest = 1 - self.total
        weight = torch.where(halts, rest, torch.where(goes_on, p, 0))
        steps = self.steps + self.running.to(self.steps.dtype)
        return weight, Progress(
            self.total + torch.where(goes_on, p, 0), goes_on, steps, torch.where(halts, rest, self.remainder)
        )


class Halting(nn.Module):
    """p = σ(w · x + b) of each position, in at least fp32."""

    def __init__(self, hidden_size: int, init_range: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(1))
        self.init_range = init_range

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_range)
        nn.init.ones_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, hidden_size) → (…)."""
        logit = x @ self.weight
        exact = torch.promote_types(logit.dtype, torch.float32)
        return torch.sigmoid(logit.to(exact) + self.bias.to(exact))
