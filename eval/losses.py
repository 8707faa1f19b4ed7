"""The loss of every single prediction, without the logits of all tokens at once."""

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.kernels.linear_cross_entropy import linear_cross_entropy, tokens_of_chunk
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.layout import Layout
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.train.data.packing import IGNORED


def token_losses(
    model: nn.Module,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    cache: RiverrunCache | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats of every prediction, (B, T), zero where targets is IGNORED; see `Batch` for the arguments.

    The softmax is in fp32 (fp64 for a model in fp64) and never holds the logits of all tokens. Other models than
    Riverrun's hand out all logits at once, in their own dtype.

    Args:
        cache: of the tokens before; updated. Riverrun's models only.
    """
    if isinstance(model, RiverrunForCausalLM):
        B, T = input_ids.shape
        if cu_seqlens is not None:
            layout = Layout.of_documents((B, T), cu_seqlens)
        else:
            fresh = cache is None or cache.next_position is None
            layout = Layout.of_rows((B, T), input_ids.new_zeros(B) if fresh else cache.next_position)  # type: ignore
        hidden = model.hidden_states(input_ids, layout, cache).flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, targets.flatten(), reduction="none").loss
        return loss.view(B, T)
    if cu_seqlens is not None or cache is not None:
        raise ValueError("packed or streamed sequences need a Riverrun model; give others one sequence a row")
    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)  # (B·T, V)
    rows = tokens_of_chunk(logits, logits.shape[1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = [
        F.cross_entropy(part.to(dtype), target, ignore_index=IGNORED, reduction="none")
        for part, target in zip(logits.split(rows), targets.flatten().split(rows))
    ]
    return torch.cat(parts).view(targets.shape)
