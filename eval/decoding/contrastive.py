"""Contrastive search (arXiv 2202.06417) for models whose state cannot be rolled back.

    next token = argmax over v in the top k of  (1 − α) · p(v) − α · max_j cos(h_v, h_j)

h_v is the model's last hidden state after v, h_j those of all tokens before it, the prompt's included. A recurrent
state that has read v cannot forget it, so a step forks it: k copies read one candidate each, in one batch, and the
chosen one goes on. The hidden states of the past are kept, one vector a token.
"""

import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from riverrun.eval.decoding.generate import PREFILL_CHUNK, Generation
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.layout import Layout
from riverrun.modeling.model import RiverrunForCausalLM


@dataclass(frozen=True)
class ContrastiveOptions:
    """Attributes:
    k: candidates a step.
    alpha: weight of the similarity; 0: greedy.

    Raises:
        ValueError: k below 1, or alpha outside [0, 1].
    """

    k: int = 4
    alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 <= self.alpha <= 1:
            raise ValueError(f"contrastive needs k ≥ 1 and 0 ≤ alpha ≤ 1, not k={self.k}, alpha={self.alpha}")


@torch.no_grad()
def contrastive_search(
    model: RiverrunForCausalLM,
    prompt: list[int],
    options: ContrastiveOptions,
    *,
    max_new_tokens: int,
    eos_id: int | None,
) -> Generation:
    """Continue a prompt by one sample.

    Raises:
        ValueError: an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens: start from the beginning- or end-of-sequence token")
    began = time.perf_counter()
    cache = model.make_cache()
    device = model.lm_head.weight.device
    read = torch.tensor([prompt], device=device).split(PREFILL_CHUNK, dim=1)
    hidden = torch.cat([_read(model, piece, cache) for piece in read], dim=1)[0]
    past = F.normalize(hidden, dim=-1)  # (T, D)
    p = _probabilities(model, hidden[-1])
    prefilled = time.perf_counter()
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        likely, candidates = p.topk(min(options.k, len(p)))
        cache.reorder_cache(torch.zeros(len(candidates), dtype=torch.long, device=device))
        hidden = _read(model, candidates[:, None], cache)[:, 0]  # (k, D)
        new = F.normalize(hidden, dim=-1)
        similarity = (new @ past.T).max(dim=1).values
        best = int(((1 - options.alpha) * likely - options.alpha * similarity).argmax())
        cache.reorder_cache(torch.tensor([best], device=device))
        past = torch.cat([past, new[best : best + 1]])
        p = _probabilities(model, hidden[best])
        tokens.append(int(candidates[best]))
        if tokens[-1] == eos_id:
            break
    return Generation([tokens], prefilled - began, time.perf_counter() - prefilled, cache.num_bytes())


def _read(model: RiverrunForCausalLM, input_ids: torch.Tensor, cache: RiverrunCache) -> torch.Tensor:
    """Hidden states (B, T, D) of new tokens after those in the cache."""
    start = input_ids.new_zeros(len(input_ids)) if cache.next_position is None else cache.next_position
    k, T = input_ids.shape
    return model.hidden_states(input_ids, Layout.of_rows((k, T), start), cache)


def _probabilities(model: RiverrunForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    logits = model.lm_head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
