"""Self-speculation: the core drafts tokens with few iterations and checks them with all (arXiv 2502.05171, §6.4).

A round drafts m tokens one by one with d iterations each, and then goes on from the drafted states: iterations d + 1
to r run once over all m tokens. Iterations have slots of their own, as in training, and s_0 follows from positions, so
the first d iterations are those that decoding without drafts would compute, and nothing is done twice. A round takes
m d + r − d iterations one after the other, and makes 1 … m tokens.

Greedily, drafts are kept up to the first one that is not the likeliest token, which takes its place: token for token
what `ar` decodes, up to rounding, which differs between calls of one and of m tokens. Otherwise by speculative sampling
(Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): with p the full model's distribution and
q the draft's, after temperature and cuts, a draft y is kept with probability min(1, p(y) / q(y)), and the first that is
not is drawn again in proportion to max(0, p − q). The tokens then have the distribution of `ar`.

After a rejection the states of the kept tokens are taken on: those of the first d iterations were there when the draft
was, attention's keys and values of the others are cut off, and recurrent layers run again (see `window`), all r − d
iterations in one call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from riverrun.eval.decoding.recurrent_depth.choice import Choice
from riverrun.eval.decoding.recurrent_depth.sampler import Progress, Sampler, require_single
from riverrun.eval.decoding.recurrent_depth.window import Pass, Window
from riverrun.modeling.depth.cache import DepthCache


class Draft(NamedTuple):
    """A drafted token.

    Attributes:
        e, s: (1, 1, h) of the token before it, from which it was drafted: the prelude's output, and s_d.
        cache: after that token, of the first d iterations.
        logits: (1, V) by which it was drawn.
        token: (1, 1)
    """

    e: torch.Tensor
    s: torch.Tensor
    cache: DepthCache
    logits: torch.Tensor
    token: torch.Tensor


@dataclass(frozen=True)
class Speculative(Sampler):
    """Attributes:
    draft_tokens: m, of a round at most.
    draft_steps: d, iterations of a drafted token.

    Raises:
        ValueError: either below 1.
    """

    draft_tokens: int = 4
    draft_steps: int = 4

    def __post_init__(self) -> None:
        if self.draft_tokens < 1 or self.draft_steps < 1:
            raise ValueError(
                f"speculative.draft_tokens={self.draft_tokens} and speculative.draft_steps={self.draft_steps} must be "
                "at least 1"
            )

    @property
    def shared_slots(self) -> None:
        return None

    def check(self, num_steps: int, num_samples: int) -> None:
        require_single("speculative", num_samples)
        if self.draft_steps >= num_steps:
            raise ValueError(
                f"speculative.draft_steps={self.draft_steps} must be fewer than the {num_steps} iterations that check "
                "the drafts: ask for fewer, or for more iterations (--num-steps)"
            )

    def tokens(self, progress: Progress) -> Iterator[torch.Tensor]:
        new, left = progress.first, progress.wanted
        while left > 0:
            drafts = self._draft(progress, new, min(self.draft_tokens, left))
            kept = self._check(progress, drafts)
            new, left = kept[:, -1:], left - kept.shape[1]
            yield kept

    def _draft(self, progress: Progress, token: torch.Tensor, number: int) -> list[Draft]:
        """That many tokens after `token`."""
        drafts: list[Draft] = []
        cache = progress.cache
        for _ in range(number):
            window = Window(progress.body, cache, 1)
            e, prelude = window.read(token)
            s, drive = window.initial_state(e), progress.body.core.injection.drive(e)
            core = []
            for t in range(self.draft_steps):
                s, done = window.iterate(s, drive, t)
                core.append(done)
            hidden, coda = window.finish(s)
            logits = progress.logits(hidden)
            cache, token = window.freeze(1, prelude, core, coda), progress.choice.choose(logits)[:, None]
            drafts.append(Draft(e, s, cache, logits, token))
        progress.calls += self.draft_steps * number
        progress.iterations += self.draft_steps * number
        return drafts

    def _check(self, progress: Progress, drafts: list[Draft]) -> torch.Tensor:
        """(1, F) the tokens that stay, by the other iterations; moves the cache on by as many."""
        body, d, m = progress.body, self.draft_steps, len(drafts)
        window = Window(body, progress.cache, m)
        s = torch.cat([draft.s for draft in drafts], dim=1)
        drive = body.core.injection.drive(torch.cat([draft.e for draft in drafts], dim=1))
        core: list[Pass] = []
        for t in range(d, progress.num_steps):
            s, done = window.iterate(s, drive, t)
            core.append(done)
        hidden, coda = window.finish(s)
        progress.calls += progress.num_steps - d
        progress.iterations += (progress.num_steps - d) * m
        number, tokens = judge(progress.choice, progress.logits(hidden), drafts)
        progress.had[progress.num_steps] += number

        drafted, first = drafts[number - 1].cache, len(body.prelude)
        size = drafted.core
        slots = [drafted.layers[i : i + size] for i in range(drafted.outside, len(drafted.layers), size)]
        slots += window.keep(body.core.layers, core, number)
        after_coda = window.keep(body.coda, [coda], number)[0]
        progress.cache = window.moved(number, drafted.layers[:first], after_coda, slots)
        return tokens[None, :number]


def judge(choice: Choice, logits: torch.Tensor, drafts: list[Draft]) -> tuple[int, torch.Tensor]:
    """How many tokens stay, at least 1 and the last of them instead of a draft that does not, and the tokens (m,).

    Args:
        logits: (m, V) of the full model, of the tokens that the drafts were drawn for.
    """
    drafted = torch.cat([draft.token for draft in drafts]).squeeze(1)
    if choice.greedy:
        instead = choice.choose(logits)
        good = instead == drafted
    else:
        p = choice.probabilities(logits)
        q = choice.probabilities(torch.cat([draft.logits for draft in drafts]))
        place = drafted[:, None]
        good = choice.uniform(len(drafted)) * q.gather(1, place)[:, 0] < p.gather(1, place)[:, 0]
        left = (p - q).clamp(min=0).log()  # −∞ throughout where p = q, and every draft is good
        noise = choice.noise(left)
        assert noise is not None
        instead = (left + noise).argmax(-1)
    number = min(int(good.long().cumprod(0).sum()) + 1, len(drafted))
    return number, torch.where(good, drafted, instead)
