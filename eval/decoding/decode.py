"""Continuations of prompts by any decoding of the registry."""

from riverrun.eval.decoding.complete import complete
from riverrun.eval.decoding.contrastive import contrastive_search
from riverrun.eval.decoding.registry import Decoding
from riverrun.eval.models import LoadedModel
from riverrun.modeling.model import RiverrunForCausalLM


def decode(
    model: LoadedModel, decoding: Decoding, prompts: list[list[int]], max_new_tokens: int, seed: int = 0
) -> list[list[int]]:
    """What a model appends to each prompt, without the end-of-sequence token; shorter than `max_new_tokens` if and only
    if that came. The same for a seed, however prompts are batched.

    Raises:
        ValueError: contrastive search with another model than Riverrun's.
    """
    tokenizer = model.require_tokenizer()
    if decoding.name == "contrastive":
        network = require_forking(model)
        made = [
            contrastive_search(
                network, prompt, decoding.options, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id
            ).tokens[0]
            for prompt in prompts
        ]
        return [row[:-1] if row[-1:] == [tokenizer.eos_id] else row for row in made]
    processors = decoding.processors(tokenizer, seed) or None
    return complete(model, prompts, max_new_tokens, processors, processors_see_prompt=decoding.sees_prompt)


def require_forking(model: LoadedModel) -> RiverrunForCausalLM:
    """Raises ValueError for a model whose decoding state we cannot copy."""
    if not isinstance(model.model, RiverrunForCausalLM):
        raise ValueError(
            f"contrastive search copies decoding states, Riverrun's only: it cannot those of {model.description}"
        )
    return model.model
