"""The causal convolution over shards: a rank's first tokens need the last ones of the rank before."""

import torch

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.modeling.parallel.collectives import shift
from riverrun.modeling.parallel.context import Context


def context_conv1d(
    context: Context, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """`causal_conv1d` of rows that several ranks share. x (B, T, D), or (1, B·T, D) if documents begin inside rows.

    The last W − 1 inputs of every row go to the next rank, and their gradients come back.

    Raises:
        ValueError: a document passes through a shard of fewer than W − 1 tokens a row.
    """
    (B, T), tail = context.shape, weight.shape[1] - 1
    initial = None
    if context.connected and tail:
        if tail > T:
            raise ValueError(
                f"shards of {T} tokens a row are shorter than the {tail} that a convolution of {tail + 1} taps looks "
                "back: lower parallel.cp, or take longer rows"
            )
        last = x.view(B, T, -1)[:, T - tail :]
        if context.cu_seqlens is not None:  # what lies before the row's last piece is another document's
            place = torch.arange(T - tail, T, device=x.device)
            last = last.where((place >= context.first_of_last[:, None])[..., None], 0)
        before = shift(last, context.axis)
        joins = context.mask(context.joins[context.axis.rank], before)
        initial = context.initial(torch.where(joins, before, 0))
    y, _ = causal_conv1d(
        x, weight, bias, activation=activation, initial_state=initial, cu_seqlens=context.cu_seqlens
    )  # fmt: skip
    return y
