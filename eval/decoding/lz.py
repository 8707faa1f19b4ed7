"""The LZ penalty (arXiv 2504.20131): the next token's logit less what repeating makes the text cheaper to compress.

    z(v) += α · ΔC(v)

ΔC(v) is by how much v lengthens the LZ77 code of the last `buffer` tokens, given the `window` tokens before them, in
bits. With l the longest match that ends here, at distance d, and V tokens in the vocabulary:

    v nowhere in window and buffer      log₂ V, a literal
    v continues a longest match         log₂ (l + 1)/l + log₂ d′/d, with d′ ≥ d the nearest match that v continues
    v elsewhere, at distance d          log₂ d, a new match of length 1

A match is coded as one from the least length L on with log₂ window + log₂ L ≤ L · log₂ V; shorter ones are literals.

Sign. Cheap tokens must fall against literals, so ΔC is added. (A published script subtracts it, which rewards repeats.)
Here the constant α·log₂ V is subtracted from all, which no softmax sees: literals keep their logits to the bit.
The paper leaves the base of the logarithm open; bits are our reading.
"""

from dataclasses import dataclass
from math import log2

import torch

from riverrun.eval.decoding.rows import RowProcessor, lowered
from riverrun.eval.repetition.tandem import suffix_matches


@dataclass(frozen=True)
class LZOptions:
    """Attributes:
    alpha: logits a bit.
    window, buffer: tokens.
    prompt: whether the prompt is part of them.

    Raises:
        ValueError: a window or buffer below 1, or a negative alpha.
    """

    alpha: float = 0.15
    window: int = 512
    buffer: int = 32
    prompt: bool = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.buffer < 1 or self.alpha < 0:
            raise ValueError(
                f"lz needs window ≥ 1, buffer ≥ 1 and alpha ≥ 0, not window={self.window}, buffer={self.buffer}, "
                f"alpha={self.alpha}"
            )


class LZ(RowProcessor):
    def __init__(self, options: LZOptions):
        self.options = options

    def row(self, tokens: list[int], scores: torch.Tensor) -> torch.Tensor:
        alpha, literal = self.options.alpha, log2(len(scores))
        costs = self.costs(tokens, len(scores))
        return lowered(scores, {v: alpha * (literal - cost) for v, cost in costs.items() if cost < literal})

    def costs(self, tokens: list[int], vocab_size: int) -> dict[int, float]:
        """ΔC in bits of every token in window and buffer."""
        o, literal = self.options, log2(vocab_size)
        least = next(n for n in range(1, 64) if log2(o.window) + log2(n) <= n * literal)

        def code(length: int, distance: int) -> float:
            return log2(distance) + log2(length) if length >= least else length * literal

        tokens = tokens[-(o.window + o.buffer) :]
        n = len(tokens)
        matches = [min(length, o.buffer) for length in suffix_matches(tokens)[:-1]]
        found: dict[int, float] = {}
        for i in range(n):  # later places are nearer: the last one counts
            found[tokens[i]] = code(1, n - i)
        longest = max(matches, default=0)
        if longest:
            nearest = n - 1 - max(i for i, length in enumerate(matches) if length == longest)
            before = code(longest, nearest)
            for i, length in enumerate(matches):
                if length == longest:
                    found[tokens[i + 1]] = max(0.0, code(longest + 1, n - 1 - i) - before)
        return found
