"""Causal convolutions over shards: a rank's first tokens need the last ones of the rank before."""

from collections.abc import Sequence

import torch

from riverrun.modeling.parallel.collectives import with_end
from riverrun.modeling.parallel.context import Context


def with_inputs_before(
    context: Context, inputs: Sequence[torch.Tensor], taps: int
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The inputs of convolutions of that many taps, on rows that several ranks share, each to be used once: (B, T, D),
    or (1, B·T, D) if documents begin inside rows; and what these begin with: the taps − 1 inputs before each of the
    shard's S pieces of documents, (S, taps − 1, D), or None: zeros.

    The last inputs of every row go to the next rank, all in one message, and their gradients come back.

    Raises:
        ValueError: a document passes through a shard of fewer than taps − 1 tokens a row.
    """
    (B, T), tail = context.shape, taps - 1
    if not context.connected or not tail:
        return [(x, None) for x in inputs]
    if tail > T:
        raise ValueError(
            f"shards of {T} tokens a row are shorter than the {tail} that a convolution of {taps} taps looks "
            "back: lower parallel.cp, or take longer rows"
        )
    wholes, ends = zip(*(with_end(x.view(B, T, -1), T - tail) for x in inputs))
    last = torch.cat(ends, dim=-1) if len(ends) > 1 else ends[0]
    if context.cu_seqlens is not None:  # what lies before the row's last piece is another document's
        place = torch.arange(T - tail, T, device=last.device)
        last = last.where((place >= context.first_of_last[:, None])[..., None], 0)
    before = context.initial(context.before(last))
    befores = before.split([x.shape[-1] for x in inputs], dim=-1) if len(inputs) > 1 else [before]
    return [(whole.view(x.shape), before) for whole, x, before in zip(wholes, inputs, befores)]
