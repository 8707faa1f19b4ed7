"""Presence and frequency penalties: z(v) −= α_p · [v occurred] + α_f · occurrences of v."""

from collections import Counter
from dataclasses import dataclass

import torch

from riverrun.eval.decoding.rows import RowProcessor, lowered


@dataclass(frozen=True)
class PresenceOptions:
    """Attributes:
    presence: α_p, for a token that occurred at all.
    frequency: α_f, for each time.
    prompt: whether the prompt counts, too. Servers count what was generated only.
    """

    presence: float = 0.5
    frequency: float = 0.5
    prompt: bool = False


class Presence(RowProcessor):
    def __init__(self, options: PresenceOptions):
        self.options = options

    def row(self, tokens: list[int], scores: torch.Tensor) -> torch.Tensor:
        o = self.options
        return lowered(scores, {v: o.presence + o.frequency * count for v, count in Counter(tokens).items()})
