"""What samplers have in common: a prompt, read at full depth, and tokens that come one or several at a time."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from riverrun.eval.decoding.generate import PREFILL_CHUNK, Generation, Sampling
from riverrun.eval.decoding.recurrent_depth.choice import Choice
from riverrun.modeling.depth.cache import DepthCache
from riverrun.modeling.depth.model import DepthModel
from riverrun.modeling.layout import Layout
from riverrun.modeling.model import RiverrunForCausalLM


@dataclass
class Progress:
    """A text on its way, which a sampler moves on.

    Attributes:
        cache: after the prompt; samplers put in its place the one after every token that they have done with.
        choice: of tokens.
        num_steps: r.
        first: (B, 1) the first new tokens, which follow from the prompt.
        wanted: tokens of each row that are to follow them, at most.
        calls: iterations of the core so far, one after the other, on however many tokens.
        iterations: those times their tokens, of all rows.
        had: how many tokens have had how many iterations when they were done with.
    """

    model: RiverrunForCausalLM
    cache: DepthCache
    choice: Choice
    num_steps: int
    first: torch.Tensor
    wanted: int
    calls: int = 0
    iterations: int = 0
    had: Counter[int] = field(default_factory=Counter)

    @property
    def body(self) -> DepthModel:
        return self.model.model

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (B, W, h) → (B·W, V)"""
        return self.model.lm_head(hidden.flatten(0, 1))


@dataclass(frozen=True)
class Sampler(ABC):
    """A way of decoding, with its options. Constructors raise ValueErrors for those that are impossible."""

    @property
    @abstractmethod
    def shared_slots(self) -> int | None:
        """Slots of the core's states that iterations share (see `DepthCache`); None: each has its own."""

    @abstractmethod
    def check(self, num_steps: int, num_samples: int) -> None:
        """Raises ValueError for a number of iterations or samples that it cannot do."""

    @abstractmethod
    def tokens(self, progress: Progress) -> Iterator[torch.Tensor]:
        """New tokens (B, any number), which stay; up to `wanted` of each row, or more if B = 1."""


@dataclass(frozen=True)
class DepthGeneration(Generation):
    """Attributes:
    calls: iterations of the core, one after the other, after the prompt.
    iterations: those times the tokens that each was on.
    had: how many tokens had how many iterations when they were done with. The last of a text is never read.
    """

    calls: int
    iterations: int
    had: Counter[int]

    @property
    def decoded(self) -> int:
        """New tokens of all samples but the first ones, which come with the prompt."""
        return self.num_tokens - len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Of `decoded`."""
        return self.decoded / max(self.decode_seconds, 1e-9)

    @property
    def mean_iterations(self) -> float:
        """That a token had."""
        return sum(n * number for n, number in self.had.items()) / max(self.had.total(), 1)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt: list[int],
    sampler: Sampler,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    num_samples: int = 1,
    num_steps: int | None = None,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> DepthGeneration:
    """Continue `prompt` (at least one token) by a model of recurrent depth.

    The prompt is read at once, up to `PREFILL_CHUNK` tokens, with r iterations whatever the sampler; slots that
    iterations share are then as the last ones left them.

    Args:
        num_steps: r, iterations of the core, with most samplers at most; None: the mean in training.

    Raises:
        ValueError: another model; an empty prompt; counts below 1; a number of iterations or of samples that the
            sampler cannot do.
    """
    network = require_depth(model)
    if not prompt:
        raise ValueError("the prompt has no tokens: start from the beginning- or end-of-sequence token")
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and num_samples={num_samples} must be at least 1")
    r = sum(network.model.depth.steps(num_steps, training=False))
    sampler.check(r, num_samples)
    device = network.lm_head.weight.device
    begun = time.perf_counter()
    cache, hidden = read_prompt(network, prompt, sampler.shared_slots, r)
    choice = Choice(sampling, seed, device)
    first = choice.choose(network.lm_head(hidden).expand(num_samples, -1))[:, None]
    cache.reorder_cache(torch.zeros(num_samples, dtype=torch.long, device=device))
    wait(device)
    prefilled = time.perf_counter()
    progress = Progress(network, cache, choice, r, first, max_new_tokens - 1)
    pieces = []
    if streamer is not None:
        streamer.put(torch.tensor([prompt]))
    for new in until_end(first, sampler, progress, eos_id):
        pieces.append(new)
        if streamer is not None:
            streamer.put(new.cpu())
    if streamer is not None:
        streamer.end()
    made = torch.cat(pieces, dim=1)[:, :max_new_tokens].tolist()  # waits for the device
    seconds = time.perf_counter() - prefilled
    tokens = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in made]
    size = progress.cache.num_bytes()
    return DepthGeneration(
        tokens, prefilled - begun, seconds, size, progress.calls, progress.iterations, progress.had
    )  # fmt: skip


def require_depth(model: PreTrainedModel) -> RiverrunForCausalLM:
    """Raises ValueError for a model without a recurrent core."""
    if not (isinstance(model, RiverrunForCausalLM) and isinstance(model.model, DepthModel)):
        raise ValueError(
            "samplers of recurrent depth and a number of iterations are for models whose core runs several times "
            "(model.depth), and this one's depth is fixed: leave out --sampler and --num-steps"
        )
    return model


def read_prompt(
    model: RiverrunForCausalLM, prompt: list[int], slots: int | None, num_steps: int
) -> tuple[DepthCache, torch.Tensor]:
    """The cache after the prompt, and (1, h) what `lm_head` makes the next token's logits of."""
    cache = model.make_cache(slots)
    assert isinstance(cache, DepthCache)
    ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    for piece in ids.split(PREFILL_CHUNK, dim=1):
        layout = Layout.of_rows((1, piece.shape[1]), torch.tensor([cache.seen], device=ids.device))
        hidden = model.model(piece, layout, cache, steps=(num_steps, 0))
    return cache, hidden[:, -1]


def until_end(first: torch.Tensor, sampler: Sampler, progress: Progress, eos_id: int | None) -> Iterator[torch.Tensor]:
    """The first tokens and those of the sampler, until all rows have their end-of-sequence token or enough tokens."""
    ended = torch.zeros_like(first, dtype=torch.bool)
    made = 0
    for new in chain([first], sampler.tokens(progress)):
        over = False
        if eos_id is not None:
            ended |= (new == eos_id).any(1, keepdim=True)
            over = bool(ended.all())
            if over and len(new) == 1:  # several tokens at a time may go past it
                new = new[:, : int((new[0] == eos_id).long().argmax()) + 1]
        yield new
        made += new.shape[1]
        if over or made > progress.wanted:
            return


def require_single(sampler: str, num_samples: int) -> None:
    """Raises ValueError for several samples at a time."""
    if num_samples > 1:
        raise ValueError(
            f"the {sampler} sampler decodes one text at a time, for each goes on by another number of tokens: leave "
            f"out --num-samples {num_samples}, and change --seed instead"
        )


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
