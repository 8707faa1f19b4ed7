"""DRY ("don't repeat yourself"): tokens that would extend a repeat are penalised exponentially in its length.

    z(v) −= multiplier · base^(n − allowed_length),   n ≥ allowed_length,

n the longest match between the tokens before an earlier v and the last tokens. Matches end at breakers, tokens with a
newline, colon, quote or star in them, and breakers are never penalised, so that the marks which any dialogue or list
repeats stay free. One Z-function a step: linear in the context.
"""

from dataclasses import dataclass

import torch

from riverrun.eval.decoding.rows import RowProcessor, lowered
from riverrun.eval.repetition.tandem import suffix_matches
from riverrun.train.data.tokenizer import Tokenizer

BREAKERS = '\n:"*'
LONGEST = 50  # matches beyond count as this one: powers of the base stay finite


@dataclass(frozen=True)
class DRYOptions:
    """Attributes:
    multiplier, base: of the penalty.
    allowed_length: matches shorter than this are free.
    range: tokens that are looked at; 0: all.
    breakers: characters; none: "".
    prompt: whether matches may lie in the prompt.

    Raises:
        ValueError: a base below 1, a negative multiplier or range, or an allowed length below 1.
    """

    multiplier: float = 0.8
    base: float = 1.75
    allowed_length: int = 2
    range: int = 0
    breakers: str = BREAKERS
    prompt: bool = True

    def __post_init__(self) -> None:
        if self.base < 1 or self.multiplier < 0 or self.range < 0 or self.allowed_length < 1:
            raise ValueError(
                f"dry needs base ≥ 1, multiplier ≥ 0, range ≥ 0 and allowed_length ≥ 1, not base={self.base}, "
                f"multiplier={self.multiplier}, range={self.range}, allowed_length={self.allowed_length}"
            )


class DRY(RowProcessor):
    def __init__(self, options: DRYOptions, tokenizer: Tokenizer):
        self.options, self.tokenizer = options, tokenizer
        self._breaks: dict[int, bool] = {}

    def row(self, tokens: list[int], scores: torch.Tensor) -> torch.Tensor:
        o = self.options
        tokens = tokens[-o.range :]
        limit = min(self._since_breaker(tokens), LONGEST)
        if limit < o.allowed_length:
            return scores
        longest: dict[int, int] = {}
        for length, following in zip(suffix_matches(tokens), tokens[1:]):
            if length >= o.allowed_length and not self._is_breaker(following):
                longest[following] = max(longest.get(following, 0), min(length, limit))
        return lowered(scores, {v: o.multiplier * o.base ** (n - o.allowed_length) for v, n in longest.items()})

    def _since_breaker(self, tokens: list[int]) -> int:
        """Tokens after the last breaker, or `LONGEST` if there are more."""
        near = tokens[-LONGEST:]
        return next((i for i, token in enumerate(reversed(near)) if self._is_breaker(token)), len(near))

    def _is_breaker(self, token: int) -> bool:
        if token not in self._breaks:
            text = self.tokenizer.decode([token])
            self._breaks[token] = any(breaker in text for breaker in self.options.breakers)
        return self._breaks[token]
