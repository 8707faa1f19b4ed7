"""The tokens that a chunk learns from: its own, after those that a window reaches back to."""

from typing import NamedTuple

import torch

from riverrun.kernels.common.chunks import Chunks, sequence_bounds
from riverrun.kernels.neural_memory.rule import MemoryState


class Sources(NamedTuple):
    """Of M chunks of b tokens, s = c − 1 + b of them.

    Attributes:
        k, v: (M, H, s, K) and (M, H, s, V).
        weight: (M, H, b, s) how much of each the step of each token takes; None: of its own alone, and once.
        past: `MemoryState.past` after the sequences.
    """

    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor | None = None
    past: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


def with_window(
    chunks: Chunks,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma: torch.Tensor,
    state: MemoryState,
    window: int,
    cu_seqlens: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> Sources:
    """The sources of a window of c tokens, each with its weight γ (B, T, H). A chunk's early tokens reach back into the
    chunk before, or into `state.past`, whose gradients are then taken anew."""
    assert state.past is not None
    halo, device = window - 1, k.device
    bounds = sequence_bounds(k, cu_seqlens).to(device)
    first, length = bounds[:-1], bounds.diff()
    # every sequence's past lies behind all tokens
    start_of_past = bounds[-1] + torch.arange(len(length), device=device) * halo

    step = torch.cat([torch.full((n,), s, device=device) for s, n in enumerate(chunks.active)])
    sequence = torch.cat([chunks.order[:n] for n in chunks.active])  # (M,)
    begin = step * chunks.size if skip is None else step * chunks.size - skip[sequence]
    offset = begin[:, None] + torch.arange(-halo, chunks.size, device=device)  # (M, s), from the sequence's first token
    exists = (offset >= -halo) & (offset < length[sequence, None])
    offset = torch.where(exists, offset, 0)

    def place(sequence: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return torch.where(offset >= 0, first[sequence] + offset, start_of_past[sequence] + halo + offset)

    index = place(sequence[:, None], offset)
    each = torch.arange(len(length), device=device)[:, None]
    last = place(each, length[:, None] + torch.arange(-halo, 0, device=device))

    every = [torch.cat([x.flatten(0, 1), y.flatten(0, 1)]) for x, y in zip((k, v, gamma), state.past)]
    k, v, gamma = (x[index].transpose(1, 2) for x in every)  # (M, H, s, …)
    back = torch.arange(chunks.size, device=device)[:, None] + halo - torch.arange(halo + chunks.size, device=device)
    seen = (back >= 0) & (back <= halo) & exists[:, None]  # (M, b, s)
    return Sources(k, v, gamma[:, :, None] * seen[:, None], (every[0][last], every[1][last], every[2][last]))
