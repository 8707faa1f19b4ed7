"""How samplers choose tokens: as `generate` does, but with random numbers that can be kept.

A draw is the argmax of log p + g with g of the standard Gumbel distribution. Drawn again with the same g, a token
stays the same unless the logits change: so a draft settles once they do, and is a draw from p all the same.
"""

import torch
from transformers import LogitsProcessorList

from riverrun.eval.decoding.draw import SampleOptions
from riverrun.eval.decoding.generate import Sampling


class Choice:
    """Args:
    sampling: as of `generate`.
    seed: the same seed gives the same tokens, on one machine.
    """

    def __init__(self, sampling: Sampling, seed: int, device: torch.device):
        self.greedy = sampling.greedy
        cuts = SampleOptions(sampling.temperature, sampling.top_k or 0, sampling.top_p).cuts()
        self.cuts = LogitsProcessorList() if sampling.greedy else cuts
        self.tokens = torch.Generator(device).manual_seed(seed)
        self.others = torch.Generator(device).manual_seed(seed)  # whatever else is random

    def noise(self, like: torch.Tensor) -> torch.Tensor | None:
        """g in the shape of logits (…, V), for `choose`; None if nothing is drawn."""
        if self.greedy:
            return None
        exponential = torch.empty_like(like, dtype=torch.float32).exponential_(generator=self.tokens)
        return -exponential.log()

    def choose(self, logits: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """A token (N,) for each row of logits (N, V); without `noise`, by new random numbers."""
        scores = self.scores(logits)
        noise = self.noise(scores) if noise is None else noise
        return (scores if noise is None else scores + noise).argmax(-1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What tokens are drawn from, (N, V)."""
        return self.scores(logits).softmax(-1)

    def uniform(self, number: int) -> torch.Tensor:
        """(number,) in [0, 1)"""
        return torch.rand(number, generator=self.tokens, device=self.tokens.device)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """By temperature, −∞ where top-k or top-p leave a token out; at least fp32."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.cuts(None, scores)  # type: ignore[arg-type]
