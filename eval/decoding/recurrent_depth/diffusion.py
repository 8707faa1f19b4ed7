"""The diffusion-forcing sampler (Geiping et al. 2025, arXiv 2510.14961): many tokens at a time, at unequal depths.

A wavefront of active tokens stands after the frozen ones. Every step,

1. the prelude reads all active tokens:  e ← η e_old + (1 − η) prelude(tokens), of new ones the latter alone,
2. noise is mixed in:                    s ← (1 − β) s + β N(0, σ²), β = β_0 / (1 + c), c the iterations a token had,
3. the core runs r' times on all,
4. every active token but the first becomes what is drawn at the one before it,
5. tokens that have converged are frozen, from the first on, and the head moves on by `headway` new tokens.

A token has converged when its state has changed over the step by less than ε, ‖Δs‖ / ‖s‖, or when it has had r
iterations. The prefix of converged tokens is frozen, as the paper says; the authors' code freezes up to the last one.
One more rule makes frozen tokens agree with their states: a token that step 4 has just changed stays active. So with
headway 1 a token gets ⌈r / r'⌉ r' iterations at most, and with more it may wait for those beside it to settle.
ε = 0 is the fixed schedule, in which ⌈r / r'⌉ tokens are active; with r' = r as well it is decoding token by token with
shared slots.

Tokens are drawn by random numbers that stay with their places, so that drafts change only with their logits (`choice`).
What a frozen token says of its successor is final, and only that counts as text: a drafted end-of-sequence token may
change again. Keys and values, or states, of the core are shared by iterations as in `window`: the frozen ones are last
iterates', and those of a step are dropped but for the tokens that it froze.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from riverrun.eval.decoding.recurrent_depth.autoregressive import check_slots
from riverrun.eval.decoding.recurrent_depth.exits import relative_change
from riverrun.eval.decoding.recurrent_depth.sampler import Progress, Sampler, require_single
from riverrun.eval.decoding.recurrent_depth.window import Pass, Window
from riverrun.modeling.layout import Layout


@dataclass(frozen=True)
class Diffusion(Sampler):
    """Attributes:
    inner_steps: r', iterations a step.
    threshold: ε; 0: only the number of iterations counts.
    ema: η, of the old embedding; 0: none of it.
    noise: β_0; about 0.2 serves where r' is 1 or 2.
    headway: new tokens a step; beyond the first they are random ones until the next step.
    max_wavefront: active tokens at most; the head waits meanwhile.
    slots: of the core's states, the t-th iteration of a step has slot t mod `slots`.

    Raises:
        ValueError: counts below 1, a negative threshold, η outside [0, 1), β_0 outside [0, 1], or slots that do not
            divide r', by which tokens would leave some slots a step behind the others.
    """

    inner_steps: int = 4
    threshold: float = 0.03
    ema: float = 0.1
    noise: float = 0.0
    headway: int = 1
    max_wavefront: int = 128
    slots: int = 1

    def __post_init__(self) -> None:
        check_slots("diffusion", self.slots)
        for name in ("inner_steps", "headway", "max_wavefront"):
            if getattr(self, name) < 1:
                raise ValueError(f"diffusion.{name}={getattr(self, name)} must be at least 1")
        if self.threshold < 0:
            raise ValueError(f"diffusion.threshold={self.threshold} must not be negative; 0 goes by iterations")
        if not 0 <= self.ema < 1:
            raise ValueError(f"diffusion.ema={self.ema} must be in [0, 1); 0 embeds tokens anew")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"diffusion.noise={self.noise} must be in [0, 1]; 0 is none")
        if self.inner_steps % self.slots:
            raise ValueError(
                f"diffusion.slots={self.slots} must divide diffusion.inner_steps={self.inner_steps}, so that a step "
                "fills every slot equally often"
            )

    @property
    def shared_slots(self) -> int:
        return self.slots

    def check(self, num_steps: int, num_samples: int) -> None:
        require_single("diffusion", num_samples)
        if self.inner_steps > num_steps:
            raise ValueError(
                f"diffusion.inner_steps={self.inner_steps} must not be more than the {num_steps} iterations of a "
                "token: ask for fewer, or for more iterations (--num-steps)"
            )

    def tokens(self, progress: Progress) -> Iterator[torch.Tensor]:
        wavefront = Wavefront(self, progress)
        while wavefront.had:
            wavefront.step()
            frozen = wavefront.advance()
            if frozen.shape[1]:
                yield frozen


class Wavefront:
    """The active tokens, W of them.

    Attributes:
        tokens: (1, W)
        s: (1, W, h) states.
        e: (1, W', h) embeddings of the step before, of the first W' ≤ W.
        had: of each token, the iterations that it has had; later ones never had more.
        noise: (W, V) what is added to the logits before the likeliest token is taken; None: nothing.
    """

    def __init__(self, options: Diffusion, progress: Progress):
        self.options, self.progress = options, progress
        self.had: list[int] = []
        self.made = 0  # tokens so far, frozen and active
        weight = progress.model.lm_head.weight
        self.logits_like = weight.new_empty(1, len(weight))
        self.tokens = progress.first[:, :0]
        self.s = self.e = weight.new_empty(1, 0, weight.shape[1])
        self.noise = progress.choice.noise(self.logits_like[:0])
        self._append(progress.first)

    def step(self) -> None:
        """Iterations of all, the tokens that are drawn by them, and the change of every state."""
        o, body = self.options, self.progress.body
        self.window = Window(body, self.progress.cache, len(self.had))
        e, self.prelude = self.window.read(self.tokens)
        old = self.e.shape[1]
        self.e = torch.cat([o.ema * self.e + (1 - o.ema) * e[:, :old], e[:, old:]], dim=1)
        before, s = self.s, self._noised(self.s)
        drive = body.core.injection.drive(self.e)
        core: dict[int, Pass] = {}
        for t in range(o.inner_steps):
            s, core[t % o.slots] = self.window.iterate(s, drive, t % o.slots)
        self.core = list(core.values())
        hidden, self.coda = self.window.finish(s)
        self.drawn = self.progress.choice.choose(self.progress.logits(hidden), self.noise)
        self.s, self.change = s, relative_change(before, s)[0]
        self.had = [n + o.inner_steps for n in self.had]
        self.progress.calls += o.inner_steps
        self.progress.iterations += o.inner_steps * len(self.had)

    def advance(self) -> torch.Tensor:
        """Freezes what has converged and appends new tokens. Returns (1, F) what the frozen ones are followed by."""
        o, progress = self.options, self.progress
        frozen = self._converged()
        if frozen:
            progress.cache = self.window.freeze(frozen, self.prelude, self.core, self.coda)
            progress.had.update(self.had[:frozen])
        active = slice(frozen, None)
        new = torch.cat([self.tokens[:, :1], self.drawn[None]], dim=1)[:, active]  # one more than are active
        self.tokens, self.s, self.e, self.had = new[:, :-1], self.s[:, active], self.e[:, active], self.had[active]
        self.noise = None if self.noise is None else self.noise[active]
        number = min(o.headway, o.max_wavefront - len(self.had), progress.wanted - self.made)
        if number > 0:
            self._append(torch.cat([new[:, -1:], self._random_tokens(number - 1)], dim=1))
        return self.drawn[None, :frozen]

    def _converged(self) -> int:
        """How many tokens, from the first on."""
        enough = sum(n >= self.progress.num_steps for n in self.had)
        places = torch.arange(len(self.had), device=self.change.device)
        good = (places < enough) | (self.change < self.options.threshold)
        good[1:] &= self.drawn[:-1] == self.tokens[0, 1:]
        return int(good.long().cumprod(0).sum())

    def _append(self, tokens: torch.Tensor) -> None:
        """tokens (1, n), from their s_0 on."""
        progress, number = self.progress, tokens.shape[1]
        start = progress.cache.next_position
        assert start is not None
        layout = Layout.of_rows((1, number), start + len(self.had))
        like = self.s.new_empty(1, number, self.s.shape[2])
        self.s = torch.cat([self.s, progress.body.initial_state(like, layout)], dim=1)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        self.had = [*self.had, *[0] * number]
        self.made += number
        if self.noise is not None:
            more = progress.choice.noise(self.logits_like.expand(number, -1))
            assert more is not None
            self.noise = torch.cat([self.noise, more])

    def _noised(self, s: torch.Tensor) -> torch.Tensor:
        if not self.options.noise:
            return s
        share = [self.options.noise / (1 + n) for n in self.had]
        beta = torch.tensor(share, dtype=s.dtype, device=s.device)[:, None]
        random = torch.empty_like(s).normal_(generator=self.progress.choice.others)
        return (1 - beta) * s + beta * self.progress.body.depth.initial_std * random

    def _random_tokens(self, number: int) -> torch.Tensor:
        """(1, number)"""
        choice, vocab = self.progress.choice, self.logits_like.shape[1]
        return torch.randint(vocab, (1, number), generator=choice.others, device=choice.others.device)
