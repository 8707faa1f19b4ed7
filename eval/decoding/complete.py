"""Greedy continuations of many prompts at a time."""

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from riverrun.eval.decoding.generate import PREFILL_CHUNK
from riverrun.eval.decoding.stream import continuation
from riverrun.eval.models import LoadedModel
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.model import RiverrunForCausalLM


@torch.no_grad()
def complete(
    model: LoadedModel, prompts: list[list[int]], max_new_tokens: int, processors: LogitsProcessorList | None = None
) -> list[list[int]]:
    """What a model appends to each prompt, up to the end-of-sequence token and without it.

    The prompts are one batch, padded on the left. Riverrun's models read it in pieces of `PREFILL_CHUNK` tokens; the
    first is longer by the padding, which only it may hold.

    Args:
        processors: change the logits before the likeliest token is taken. They are given one prompt at a time, without
            the padding, which must not count as repetition.
    """
    network, eos_id = model.model, model.require_tokenizer().eos_id
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = None
    if isinstance(network, RiverrunForCausalLM):
        cache, end = RiverrunCache(network.config.num_hidden_layers), width - min(map(len, prompts)) + PREFILL_CHUNK
        while cache.seen < width - 1:
            piece = slice(cache.seen, min(end, width - 1))
            network(ids[:, piece], attention_mask=mask[:, piece], past_key_values=cache, logits_to_keep=1)
            end += PREFILL_CHUNK
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id, use_cache=True
    )
    out = network.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        past_key_values=cache,
        generation_config=config,
        logits_processor=None if processors is None else LogitsProcessorList([Unpadded(processors, mask)]),
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
    model: LoadedModel, prompts: list[str], max_new_tokens: int, processors: LogitsProcessorList | None = None
) -> list[str]:
    """The same in text."""
    tokenizer, begin = model.require_tokenizer(), opening(model)
    encoded = [begin + tokenizer.encode(prompt) for prompt in prompts]
    return [
        continuation(tokenizer, prompt, made)
        for prompt, made in zip(encoded, complete(model, encoded, max_new_tokens, processors))
    ]


def opening(model: LoadedModel) -> list[int]:
    """The tokens with which `open_documents` begins a text: other models' beginning-of-sequence token."""
    bos_id = model.require_tokenizer().bos_id
    return [] if model.is_riverrun or bos_id is None else [bos_id]
