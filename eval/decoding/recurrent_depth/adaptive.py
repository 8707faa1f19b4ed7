"""Token by token, each until it has had enough iterations (Geiping et al. 2025, arXiv 2502.05171, §6.1).

Iterations share slots, for tokens have had unequally many: the next token sees in each slot the last iterate of every
token before. Several rows go on until all have done with their token; those that have keep what they had then.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from riverrun.eval.decoding.recurrent_depth.autoregressive import check_filled, check_slots
from riverrun.eval.decoding.recurrent_depth.exits import EXITS
from riverrun.eval.decoding.recurrent_depth.sampler import Progress, Sampler
from riverrun.eval.decoding.recurrent_depth.window import Pass, Window
from riverrun.modeling.mixers import States


@dataclass(frozen=True)
class Adaptive(Sampler):
    """r iterations a token at most, and at least as many as there are slots.

    Attributes:
        exit: what ends a token; see `exits`.
        threshold: of it; None: its own.
        slots: that iterations share.
        continuous: a token's s_0 is the last state of the token before (continuous compute, §6.3), but for the first
            after the prompt.

    Raises:
        ValueError: slots below 1, or a threshold that nothing can be below.
    """

    exit: Literal["kl", "latent", "argmax"] = "kl"
    threshold: float | None = None
    slots: int = 1
    continuous: bool = False

    def __post_init__(self) -> None:
        check_slots("adaptive", self.slots)
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(
                f"adaptive.threshold={self.threshold} must be positive: no token would have enough iterations by it "
                "(for r of each, use ar)"
            )

    @property
    def shared_slots(self) -> int:
        return self.slots

    def check(self, num_steps: int, num_samples: int) -> None:
        check_filled("adaptive", self.slots, num_steps)

    def tokens(self, progress: Progress) -> Iterator[torch.Tensor]:
        new, s = progress.first, None
        while True:
            window = Window(progress.body, progress.cache, 1)
            e, prelude = window.read(new)
            if s is None or not self.continuous:
                s = window.initial_state(e)
            s, core, coda, logits = self._iterate(progress, window, e, s)
            progress.cache = window.freeze(1, prelude, core, coda)
            new = progress.choice.choose(logits)[:, None]
            yield new

    def _iterate(
        self, progress: Progress, window: Window, e: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, list[Pass], Pass, torch.Tensor]:
        """The token's last state, the last pass of each slot and the coda's, and its logits (B, V)."""
        kind, threshold = EXITS[self.exit]
        done = kind(threshold if self.threshold is None else self.threshold)
        drive = progress.body.core.injection.drive(e)
        running = torch.ones(len(s), dtype=torch.bool, device=s.device)
        core: list[Pass] = []
        coda: Pass | None = None
        logits: torch.Tensor | None = None
        number = len(s)  # of rows that run
        for t in range(progress.num_steps):
            slot, before = t % self.slots, s
            s, ran = window.iterate(before, drive, slot)
            if number < len(s):
                s, ran = torch.where(running[:, None, None], s, before), _where(running, ran, core[slot])
            core[slot:] = [ran, *core[slot + 1 :]]
            if done.sees_logits:
                hidden, probe = window.finish(s)
                logits, coda = progress.logits(hidden), probe  # of a row that has done with its token, the same again
            progress.calls += 1
            progress.iterations += number
            enough = done(before, s, logits)
            if t + 1 < self.slots:
                continue
            running = running & ~enough if t + 1 < progress.num_steps else torch.zeros_like(running)
            left = int(running.sum())
            if left < number:
                progress.had[t + 1] += number - left
            number = left
            if number == 0:
                break
        if coda is None or logits is None:
            hidden, coda = window.finish(s)
            logits = progress.logits(hidden)
        return s, core, coda, logits


def _where(running: torch.Tensor, new: Pass, old: Pass) -> Pass:
    """A pass whose states are new only in the rows that run."""

    def rows(a: States, b: States) -> States:
        return {name: torch.where(running.view(-1, *[1] * (t.dim() - 1)), t, b[name]) for name, t in a.items()}

    return new._replace(after=list(map(rows, new.after, old.after)))
