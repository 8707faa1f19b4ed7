"""Greedy continuations of many prompts at a time."""

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from riverrun.eval.decoding.generate import PREFILL_CHUNK, check_prefix
from riverrun.eval.decoding.stream import continuation
from riverrun.eval.models import LoadedModel
from riverrun.modeling.model import CACHE, RiverrunForCausalLM


@torch.no_grad()
def complete(
    model: LoadedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    processors: LogitsProcessorList | None = None,
    processors_see_prompt: bool = True,
    prefix: int = 0,
) -> list[list[int]]:
    """What a model appends to each prompt, up to the end-of-sequence token and without it.

    The prompts are one batch, padded on the left. Riverrun's models read it in pieces of `PREFILL_CHUNK` tokens; the
    first is longer by the padding, which only it may hold, and holds the whole prefix.

    Args:
        processors: change the logits before the likeliest token is taken. They are given one prompt at a time, without
            the padding, which must not count as repetition.
        processors_see_prompt: otherwise they are given what follows it.
        prefix: tokens of each prompt that prefix linear attention reads without causality; all of a shorter one.

    Raises:
        ValueError: a prefix, and a model that reads none.
    """
    check_prefix(model.model, prefix)
    network, eos_id = model.model, model.require_tokenizer().eos_id
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    ends = torch.tensor([width - len(prompt) + min(len(prompt), prefix) for prompt in prompts])
    cache, whole = None, prefix > 0 and int(ends.max()) == width  # then `generate` reads the prompts, at once
    if isinstance(network, RiverrunForCausalLM) and not whole:
        cache = network.make_cache()
        end = width - min(map(len, prompts)) + max(PREFILL_CHUNK, prefix)
        while cache.seen < width - 1:
            piece, first = slice(cache.seen, min(end, width - 1)), cache.seen == 0
            network(
                ids[:, piece], attention_mask=mask[:, piece], past_key_values=cache, logits_to_keep=1,
                prefix=ends if prefix and first else None,
            )  # fmt: skip
            end += PREFILL_CHUNK
    hidden = mask if processors_see_prompt else torch.zeros_like(mask)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id, use_cache=True
    )
    out = network.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=None if processors is None else LogitsProcessorList([Unpadded(processors, hidden)]),
        **({} if cache is None else {CACHE: cache}),
        **({"prefix": ends} if whole else {}),
    )
    made = out[:, width:].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in made]


class Unpadded(LogitsProcessor):
    """Applies `processors` to each row without its padding, (B, width) 0 in `mask`, on the left."""

    def __init__(self, processors: LogitsProcessorList, mask: torch.Tensor):
        self.processors, self.padding = processors, (mask == 0).sum(1).tolist()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = zip(self.padding, input_ids.split(1), scores.split(1))
        return torch.cat([self.processors(ids[:, pad:], row) for pad, ids, row in rows])  # type: ignore[return-value]


def respond(
    model: LoadedModel,
    prompts: list[str],
    max_new_tokens: int,
    processors: LogitsProcessorList | None = None,
    prefix: int = 0,
) -> list[str]:
    """The same in text."""
    tokenizer, begin = model.require_tokenizer(), opening(model)
    encoded = [begin + tokenizer.encode(prompt) for prompt in prompts]
    return [
        continuation(tokenizer, prompt, made)
        for prompt, made in zip(encoded, complete(model, encoded, max_new_tokens, processors, prefix=prefix))
    ]


def opening(model: LoadedModel) -> list[int]:
    """The tokens with which `open_documents` begins a text: other models' beginning-of-sequence token."""
    bos_id = model.require_tokenizer().bos_id
    return [] if model.is_riverrun or bos_id is None else [bos_id]
