"""Cut sequences into fixed-length chunks that never straddle a document, in an order that suits a scan over chunks.

A *sequence* is one row of a (B, T, …) batch, or one document of a packed (1, T, …) batch described by `cu_seqlens`.
Sequences are sorted by length, longest first, and chunks are ordered step-major: first the first chunk of every
sequence, then the second chunk of every sequence that has one, and so on. A scan over chunks then needs as many steps
as the longest sequence has chunks, and step `s` works on the contiguous slice `chunks.step(s)` of the chunk axis and on
the leading `chunks.active[s]` sequences: no padding to the longest document, whatever their lengths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class _Split(torch.autograd.Function):
    """Flat tokens → flat chunks. Every token has one place, so the adjoint is a gather too: `_Join`, no scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *layout: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*layout)
        index, valid, place = layout
        out = x.index_select(0, index.flatten())
        if len(out) == len(place):  # no padding
            return out
        return out.masked_fill_(~valid.view(-1, *(1,) * (x.dim() - 1)), 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Join.apply(grad, *ctx.saved_tensors), None, None, None


class _Join(torch.autograd.Function):
    """Flat chunks → flat tokens, the adjoint of `_Split`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *layout: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*layout)
        return x.index_select(0, layout[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Split.apply(grad, *ctx.saved_tensors), None, None, None


@dataclass(frozen=True)
class Chunks:
    """The chunk layout of one batch. N sequences, M chunks of `size` tokens.

    Attributes:
        size: tokens in a chunk.
        index: (M, size) int64, the position of each token in the flattened (B·T) batch; 0 at padding.
        valid: (M, size) bool, False at padding (a sequence's last chunk may be short).
        place: (B·T,) int64, the place of each token in the flattened (M·size) chunks: the inverse of `index`.
        active: for each scan step, how many sequences still have a chunk.
        order: (N,) int64, the sequence at each place of the sorted order.
        shape: (B, T) of the batch.
    """

    size: int
    index: torch.Tensor
    valid: torch.Tensor
    place: torch.Tensor
    active: tuple[int, ...]
    order: torch.Tensor
    shape: tuple[int, int]

    def step(self, s: int) -> slice:
        """The slice of the chunk axis that scan step `s` works on."""
        start = sum(self.active[:s])
        return slice(start, start + self.active[s])

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, …) → (M, size, …), zeros at padding."""
        out = _Split.apply(x.reshape(-1, *x.shape[2:]), self.index, self.valid, self.place)
        return out.view(*self.index.shape, *x.shape[2:])

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """(M, size, …) → (B, T, …), padding dropped. The inverse of `split`."""
        out = _Join.apply(x.reshape(-1, *x.shape[2:]), self.index, self.valid, self.place)
        return out.view(*self.shape, *x.shape[2:])

    def scan(
        self, update: Callable[..., torch.Tensor], state: torch.Tensor, *terms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Carry `state` (N, …), in the caller's sequence order, over the chunks of every sequence.

        `update(state, *terms)` gets the states (n, …) of the n sequences that still have a chunk, and the `terms`
        (M, …) of those chunks cut to (n, …); it returns the states after them.

        Returns:
            The state at the start of each chunk (M, …), and at the end of each sequence (N, …).
        """
        state, starts, ended = self.sort(state), [], []
        for active, *step in zip(self.active, *(term.split(self.active) for term in terms)):
            if active < len(state):  # sequences are sorted by length: the last ones end first
                ended.append(state[active:])
                state = state[:active]
            starts.append(state)
            state = update(state, *step)
        return torch.cat(starts), self.unsort(torch.cat([state, *reversed(ended)]))

    def sort(self, state: torch.Tensor) -> torch.Tensor:
        """(N, …) states in the caller's sequence order → sorted order."""
        return state.index_select(0, self.order)

    def unsort(self, state: torch.Tensor) -> torch.Tensor:
        """(N, …) states in sorted order → the caller's sequence order. The inverse of `sort`."""
        return state.index_select(0, torch.argsort(self.order))


def sequence_bounds(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The (N + 1,) int64 CPU bounds of the sequences in the flattened (B·T) batch `x` (B, T, …).

    Raises:
        ValueError: `cu_seqlens` with B ≠ 1, or not strictly rising from 0 to T.
    """
    B, T = x.shape[:2]
    if cu_seqlens is None:
        return torch.arange(0, (B + 1) * T, T) if T else torch.zeros(B + 1, dtype=torch.int64)
    bounds = cu_seqlens.to("cpu", torch.int64)
    if B != 1:
        raise ValueError(f"cu_seqlens describes documents packed into one row: expected batch size 1, got {B}")
    if bounds.dim() != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != T or (bounds.diff() <= 0).any():
        raise ValueError(f"cu_seqlens must rise strictly from 0 to T={T}, got {bounds.tolist()[:16]}")
    return bounds


def chunk_layout(
    x: torch.Tensor, size: int, cu_seqlens: torch.Tensor | None = None, skip: torch.Tensor | None = None
) -> Chunks:
    """The layout of batch `x` (B, T, …), or of its documents, in chunks of `size` tokens (see the module docstring).

    Without `cu_seqlens` and `skip` the layout follows from the shape alone: it costs no transfer, and torch.compile can
    trace it.

    Args:
        skip: (N,) below `size`, the places that are left free in each sequence's first chunk: it goes on with one.

    Raises:
        ValueError: `size` below 1, an empty batch, or bad `cu_seqlens` (see `sequence_bounds`).
    """
    B, T = x.shape[:2]
    if size < 1:
        raise ValueError(f"the chunk size must be at least 1, got {size}")
    if B < 1 or T < 1:
        raise ValueError(f"there must be at least one sequence and one token, got a batch of B={B}, T={T}")
    before: torch.Tensor | int = 0
    if cu_seqlens is None and skip is None:
        active: tuple[int, ...] = (B,) * -(-T // size)
        chunk = torch.arange(len(active) * B, device=x.device)
        step, sequence = chunk // B, chunk % B
        order = torch.arange(B, device=x.device)
        starts, lengths = order * T, torch.full_like(order, T)
    else:
        bounds = sequence_bounds(x, cu_seqlens)
        free = bounds.new_zeros(len(bounds) - 1) if skip is None else skip.to(bounds)
        lengths, order = (bounds.diff() + free).sort(descending=True, stable=True)
        starts = (bounds[:-1] - free)[order]
        num_chunks = (lengths + size - 1) // size
        active = tuple((num_chunks[None] > torch.arange(int(num_chunks[0]))[:, None]).sum(1).tolist())
        step = torch.repeat_interleave(torch.arange(len(active)), torch.tensor(active))
        sequence = torch.cat([torch.arange(n) for n in active])
        before = free[order][sequence, None]
    offset = step[:, None] * size + torch.arange(size, device=step.device)
    valid = (offset < lengths[sequence, None]) & (offset >= before)
    token = starts[sequence, None] + offset
    # padding writes to one place too many, which is dropped
    place = torch.empty(B * T + 1, dtype=torch.int64, device=step.device)
    place = place.scatter(
        0, torch.where(valid, token, B * T).flatten(), torch.arange(token.numel(), device=step.device)
    )
    index, valid, place, order = (t.to(x.device) for t in (torch.where(valid, token, 0), valid, place[:-1], order))
    return Chunks(size, index, valid, place, active, order, (B, T))
