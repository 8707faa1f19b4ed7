"""Sampling from a language model, with a prompt of any length."""

import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.layout import Layout
from riverrun.modeling.model import CACHE, RiverrunForCausalLM

PREFILL_CHUNK = 4096  # tokens of the prompt that are read at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut to the `top_k` likeliest tokens and then to
    the fewest whose probabilities add up to `top_p` (nucleus sampling, arXiv 1904.09751). `greedy`: the likeliest.

    Raises:
        ValueError: a temperature that is not positive, top_k below 1 or top_p outside (0, 1].
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    greedy: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; for the likeliest token use greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or left out for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps all tokens")


@dataclass(frozen=True)
class Generation:
    """Attributes:
    tokens: new tokens a sample, the end-of-sequence token included if it came.
    prefill_seconds: reading the prompt.
    decode_seconds: everything after it.
    state_bytes: of the decoding state of all samples at the end; None for models that are not Riverrun's.
    """

    tokens: list[list[int]]
    prefill_seconds: float
    decode_seconds: float
    state_bytes: int | None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all samples a second of decoding."""
        return self.num_tokens / max(self.decode_seconds, 1e-9)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt: list[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    num_samples: int = 1,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    stopping: StoppingCriteriaList | None = None,
    processors: LogitsProcessorList | None = None,
    prefix: int = 0,
) -> Generation:
    """Continue `prompt` (at least one token); the same for a seed, on one machine and number of samples.

    Riverrun's models read the prompt in pieces of `PREFILL_CHUNK` tokens, once for all samples.

    Args:
        stopping: what ends a sample besides `eos_id`.
        processors: change the logits before `sampling` does.
        prefix: tokens of the prompt that prefix linear attention reads without causality; all of a shorter one.

    Raises:
        ValueError: an empty prompt, counts below 1, or a prefix and a model that reads none.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens: start from the beginning- or end-of-sequence token")
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and num_samples={num_samples} must be at least 1")
    check_prefix(model, prefix)
    prefix = min(prefix, len(prompt))
    device = next(model.parameters()).device
    start = time.perf_counter()
    input_ids = torch.tensor([prompt], device=device).expand(num_samples, -1)
    cache, whole = None, 0 < prefix == len(prompt)  # then `model.generate` reads the prompt, at once
    if isinstance(model, RiverrunForCausalLM):
        cache = model.make_cache()
        if not whole:
            cache = prefill(model, prompt[:-1], num_samples, prefix=prefix)
    _wait(device)
    prefilled = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=_config(sampling, max_new_tokens, eos_id),
            streamer=streamer,
            stopping_criteria=stopping,
            logits_processor=processors,
            **({} if cache is None else {CACHE: cache}),
            **({"prefix": prefix} if whole else {}),
        )
    _wait(device)
    tokens = [_until(row, eos_id) for row in out[:, len(prompt) :].tolist()]
    end = time.perf_counter()
    return Generation(tokens, prefilled - start, end - prefilled, None if cache is None else cache.num_bytes())


def check_prefix(model: PreTrainedModel, prefix: int) -> None:
    """Raises ValueError if the model cannot read a prefix of that many tokens without causality."""
    if prefix < 0:
        raise ValueError(f"prefix={prefix} must not be negative; 0 is none")
    if prefix and not (isinstance(model, RiverrunForCausalLM) and model.config.options.reads_prefix):
        raise ValueError(
            f"prefix={prefix} is for models with layers of prefix_linear_attention and its encoder, and this one has "
            "none: leave the prefix out"
        )


def prefill(
    model: RiverrunForCausalLM, tokens: list[int], num_rows: int, chunk: int = PREFILL_CHUNK, prefix: int = 0
) -> RiverrunCache:
    """The cache of `num_rows` equal rows after `tokens`, without computing any logits; `prefix` tokens are read without
    causality, and at once."""
    cache = model.make_cache()
    device = model.lm_head.weight.device
    ids = torch.tensor([tokens], dtype=torch.long, device=device)
    first = max(chunk, prefix)
    for piece in (ids[:, :first], *ids[:, first:].split(chunk, dim=1)):
        if piece.numel():
            layout = Layout.of_rows((1, piece.shape[1]), torch.tensor([cache.seen], device=device))
            if prefix and not cache.seen:
                layout.prefix = torch.arange(piece.shape[1], device=device)[None] < prefix
            model.hidden_states(piece, layout, cache)
    return cache.reorder_cache(torch.zeros(num_rows, dtype=torch.long, device=device))


def _config(sampling: Sampling, max_new_tokens: int, eos_id: int | None) -> GenerationConfig:
    draw = {"do_sample": False} if sampling.greedy else {
        "do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p,
    }  # fmt: skip
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=eos_id, pad_token_id=0 if eos_id is None else eos_id, **draw
    )


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
    """Up to and with the end-of-sequence token: what follows is padding."""
    return tokens if eos_id not in tokens else tokens[: tokens.index(eos_id) + 1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
