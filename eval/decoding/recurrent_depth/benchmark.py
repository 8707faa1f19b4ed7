"""Samplers beside each other on the same prompts: their speed, what they cost, and what their texts are worth.

Beside each stands how far it agrees with greedy decoding at r iterations, each with its own states (`ar`), and the loss
of its texts under that same full model: a sampler may differ from it and be no worse. End-of-sequence tokens do not end
a text here, so that all are of one length.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch.nn import functional as F

from riverrun.eval.decoding.generate import Sampling
from riverrun.eval.decoding.recurrent_depth.autoregressive import Autoregressive
from riverrun.eval.decoding.recurrent_depth.sampler import DepthGeneration, Sampler, require_depth, sample
from riverrun.eval.models import LoadedModel
from riverrun.modeling.layout import Layout
from riverrun.modeling.model import RiverrunForCausalLM

WARM_UP = 8  # tokens that are decoded before any clock runs


@dataclass(frozen=True)
class Measured:
    """A sampler on all prompts.

    Attributes:
        sampler: as it was typed.
        speeds: new tokens a second, of each prompt; the first token, which comes with the prompt, does not count.
        calls: iterations of the core a new token, one after the other, on however many tokens.
        iterations: that the core computed a new token, those that were dropped counted.
        had: how many tokens had how many iterations.
        agreement: the share of a text before its first difference from the greedy one, on average.
        exact: the share of texts without a difference.
        loss: nats a token of its texts under the full model.
        texts: the new tokens of each prompt.
    """

    sampler: str
    speeds: list[float]
    calls: float
    iterations: float
    had: dict[int, int]
    agreement: float
    exact: float
    loss: float
    texts: list[list[int]]

    @property
    def speed(self) -> float:
        """The median over prompts."""
        return median(self.speeds)

    @property
    def mean_iterations(self) -> float:
        """That a token had when it was done with."""
        return sum(n * number for n, number in self.had.items()) / sum(self.had.values())


def measure(
    loaded: LoadedModel,
    samplers: dict[str, Sampler],
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    new_tokens: int,
    num_steps: int,
    seed: int = 0,
) -> Iterator[Measured]:
    """Each sampler on every prompt, after a warm-up.

    Raises:
        ValueError: see `sample`; fewer than two new tokens, of which the first comes with the prompt.
    """
    model = require_depth(loaded.model)
    if new_tokens < 2:
        raise ValueError(f"new_tokens={new_tokens} leaves nothing to time: the first comes with the prompt")

    def decode(sampler: Sampler, prompt: list[int], drawn: Sampling, number: int = new_tokens) -> DepthGeneration:
        return sample(
            model, prompt, sampler, drawn, max_new_tokens=number, eos_id=None, num_steps=num_steps, seed=seed
        )  # fmt: skip

    for sampler in samplers.values():
        sampler.check(num_steps, 1)  # what cannot be done is said at once
    greedy = [decode(Autoregressive(), prompt, Sampling(greedy=True)).tokens[0] for prompt in prompts]
    for name, sampler in samplers.items():
        decode(sampler, prompts[0], sampling, min(new_tokens, WARM_UP))
        found = [decode(sampler, prompt, sampling) for prompt in prompts]
        texts = [made.tokens[0] for made in found]
        decoded = sum(made.decoded for made in found)
        alike = [agreement(text, other) for text, other in zip(texts, greedy)]
        yield Measured(
            name,
            [made.tokens_per_second for made in found],
            sum(made.calls for made in found) / decoded,
            sum(made.iterations for made in found) / decoded,
            dict(sorted(sum((made.had for made in found), Counter()).items())),
            fmean(alike),
            fmean(share == 1 for share in alike),
            fmean(text_loss(model, prompt, text, num_steps) for prompt, text in zip(prompts, texts)),
            texts,
        )


def agreement(text: list[int], other: list[int]) -> float:
    """The share of `other` before the first place where `text` differs."""
    same = (a == b for a, b in zip(text, other))
    return next((i for i, equal in enumerate(same) if not equal), len(other)) / len(other)


@torch.no_grad()
def text_loss(model: RiverrunForCausalLM, prompt: list[int], text: list[int], num_steps: int) -> float:
    """Nats a token of `text` after a prompt, by one forward pass over both."""
    ids = torch.tensor([prompt + text], device=model.lm_head.weight.device)
    layout = Layout.of_rows((1, ids.shape[1] - 1), ids.new_zeros(1))
    hidden = model.model(ids[:, :-1], layout, steps=(num_steps, 0))[0, len(prompt) - 1 :]
    logits = model.lm_head(hidden)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), ids[0, len(prompt) :]).item()
