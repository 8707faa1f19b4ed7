"""Decides whether a step may change the weights: its loss and its gradient's norm must be finite, and not far above
those of the steps before.

A step whose loss or norm exceeds the mean of the last `window` ones by `sigma` standard deviations is skipped (OLMo 2,
section 3.2, skips such steps too; 6 sigma over 128 steps). A skipped step uses up its data and its place in the
schedule, but changes no weight and no moment. After `patience` skipped steps in a row the run goes back to its last
good checkpoint, and leaves out the data of those steps.

Losses of skipped steps stay out of the window: weights that stand still do not get worse, so that many high losses in
a row are bad data, or weights to go back from. Norms of steps that are skipped for their norm alone go into it, as in
OLMo 2: where the weights have come to a steep place every gradient is large, more skipping does not get them out of
there, and clipping bounds what a step does. With 6 sigma over 128 steps four equal norms are refused, the fifth is not.

All ranks feed in the same sums over all ranks, so that all of them decide alike.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from riverrun.train.config import GuardConfig

FLOOR = 5e-3  # of the mean: a standard deviation is taken to be at least that, or a plateau's noise would be an outlier


class Diverged(ValueError):
    """Training cannot go on as it is."""


@dataclass(frozen=True)
class Verdict:
    """What a step was refused for: "loss" or "gradient norm", its value, and the most that was allowed (None: the value
    is not finite)."""

    of: str
    value: float
    limit: float | None

    def __str__(self) -> str:
        if self.limit is None:
            return f"the {self.of} is not finite"
        return f"the {self.of} of {self.value:.4g} is above {self.limit:.4g}"


class Guard:
    """Judges steps, and counts those that were skipped.

    Attributes:
        skipped: steps, of the whole run.
        in_a_row: those up to now.
        rollbacks: of the whole run.
        broken: whether a loss or norm of those in a row was not finite.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = self.in_a_row = self.rollbacks = 0
        self.broken = False
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)

    def judge(self, loss: float | None, norm: float) -> Verdict | None:
        """Why a step must be skipped; None: it need not be.

        Args:
            loss: per prediction; None: the step had none.
        """
        pairs = [("gradient norm", norm, self._norms)]
        if loss is not None:
            pairs.insert(0, ("loss", loss, self._losses))
        for of, value, _ in pairs:
            if not math.isfinite(value):
                return Verdict(of, value, None)
        for of, value, history in pairs:
            limit = self._limit(history)
            if value > limit:
                return Verdict(of, value, limit)
        return None

    def observe(self, loss: float | None, norm: float, refused: bool) -> None:
        """Takes note of a step that is done."""
        verdict = self.judge(loss, norm) if refused else None
        self.skipped += refused
        self.in_a_row = self.in_a_row + 1 if refused else 0
        self.broken = refused and (self.broken or (verdict is not None and verdict.limit is None))
        if not refused and loss is not None:
            self._losses.append(loss)
        if not refused or (verdict is not None and verdict.of == "gradient norm" and verdict.limit is not None):
            self._norms.append(norm)

    @property
    def gives_up(self) -> bool:
        """Whether so many steps in a row were skipped that waiting for better ones is of no use."""
        return self.in_a_row >= self.config.patience

    def begin_anew(self) -> None:
        """Takes what was refused for usual: forgets the losses and norms before."""
        self.in_a_row = 0
        self._losses.clear()
        self._norms.clear()

    def state(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "rollbacks": self.rollbacks,
            "broken": self.broken,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Checkpoints of version 0.1's first weeks lack some."""
        self.skipped, self.in_a_row, self.rollbacks = state["skipped"], state["in_a_row"], state.get("rollbacks", 0)
        self.broken = state.get("broken", False)
        self._losses = deque(state.get("losses", ()), maxlen=self.config.window)
        self._norms = deque(state.get("norms", ()), maxlen=self.config.window)

    def _limit(self, history: deque[float]) -> float:
        if not self.config.sigma or len(history) < self.config.window // 2:
            return math.inf
        mean = math.fsum(history) / len(history)
        variance = math.fsum((value - mean) ** 2 for value in history) / len(history)
        return mean + self.config.sigma * max(math.sqrt(variance), FLOOR * abs(mean))
