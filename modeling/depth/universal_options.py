"""The options of a Universal Transformer."""

from dataclasses import dataclass
from typing import Literal, get_args

Halting = Literal["act", "none"]
Norm = Literal["post", "pre"]
Positions = Literal["sinusoidal", "rotary", "none"]


@dataclass(frozen=True)
class UniversalOptions:
    """A Universal Transformer (Dehghani et al. 2018, arXiv 1807.03819): the model's layers are one block that is
    applied to every position again and again; see `riverrun.modeling.depth.universal`.

    `max_steps` 1 without halting is a transformer of fixed depth with the same positions and norms.
    """

    __pydantic_config__ = {"extra": "forbid"}

    max_steps: int = 12  # twice the 6 steps of a model without halting, as in the authors' code
    halting: Halting = "act"  # each position halts by itself, or all take every step
    epsilon: float = 0.01  # a position halts once its halting probabilities sum to more than 1 − epsilon
    ponder_weight: float = 0.01  # of the mean of N + R, the steps of a position and its remainder, in the loss
    norm: Norm = "post"  # norm(x + f(x)) as in the paper, or the residual stream of our other models
    positions: Positions = "sinusoidal"  # attention.rope follows: only "rotary" has it
    random_offset: int = 0  # in training the positions of a row start at one drawn from 0 … random_offset

    def problems(self) -> list[str]:
        """Everything that is impossible, each with its fix."""
        found = []
        for name, kind in (("halting", Halting), ("norm", Norm), ("positions", Positions)):
            if getattr(self, name) not in get_args(kind):
                chosen = f"universal.{name}={getattr(self, name)!r}"
                found.append(f"{chosen} is unknown; choose from {', '.join(get_args(kind))}")
        if self.max_steps < 1:
            found.append(f"universal.max_steps={self.max_steps} must be at least 1; 12 is usual")
        if not 0 <= self.epsilon < 1:
            found.append(f"universal.epsilon={self.epsilon} must be in [0, 1); 0.01 is usual")
        if self.ponder_weight < 0:
            found.append(f"universal.ponder_weight={self.ponder_weight} must not be negative; 0.01 is usual")
        if self.random_offset < 0:
            found.append(f"universal.random_offset={self.random_offset} must not be negative; 0 starts rows at place 0")
        elif self.random_offset and self.positions != "sinusoidal":
            found.append(
                f"universal.random_offset={self.random_offset} shifts sinusoidal positions, and "
                f"universal.positions={self.positions!r} has none: set it to 0"
            )
        return found
