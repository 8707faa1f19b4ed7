"""The segments of C tokens that sequences are cut into, one of every sequence at a time, over several calls.

A call may begin and end within segments. What is computed with a segment's tokens at their places gets padding for the
others (`Chunks`); what must see no padding gets them packed.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn import functional as F

from riverrun.kernels.common.chunks import Chunks, chunk_layout
from riverrun.modeling.layout import Layout


@dataclass(frozen=True)
class Segment:
    """Of n sequences, as w columns of tokens.

    Attributes:
        begin: (n,) int64, the place in the segment of each sequence's first token of this call; None: 0.
        column: (n,) int64, that of column 0; None: 0.
        valid: (n, w) bool, False at padding.
        length: the first columns of all sequences that are their tokens; None: they differ.
        packing: where they differ, of the packed tokens, one chunk a sequence.
        cu_seqlens: (n + 1,) int32 bounds of the packed tokens.
    """

    begin: torch.Tensor | None
    column: torch.Tensor | None
    valid: torch.Tensor
    length: int | None
    packing: Chunks | None = None
    cu_seqlens: torch.Tensor | None = None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(n, w, …) → (n, length, …), or (1, tokens, …)."""
        return x[:, : self.length] if self.packing is None else self.packing.join(x)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`."""
        if self.packing is not None:
            return self.packing.split(x)
        return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, self.valid.shape[1] - x.shape[1]))

    def beside(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """new (n, w, …) at the places of its tokens, old (n, C, …) at others; new alone if no sequence goes on."""
        if self.begin is None:
            return new
        at = self.valid
        if self.column is not None:
            at = torch.arange(old.shape[1], device=new.device) == self.column[:, None]
        return torch.where(at.view(*at.shape, *[1] * (new.dim() - 2)), new, old)


def segments_of(x: torch.Tensor, layout: Layout, size: int, seen: torch.Tensor | None) -> tuple[Chunks, list[Segment]]:
    """Of the flattened x (B, T, …), in the order of its chunks: they are the columns of the segments.

    Args:
        size: C.
        seen: (S,) tokens of each sequence before this call; None: none.
    """
    cu_seqlens, begin = layout.cu_seqlens, None if seen is None else seen % size
    if layout.shape[1] == 1:  # of each sequence, and one column of its own
        chunks = chunk_layout(x, 1, cu_seqlens)
        begin = None if begin is None else chunks.sort(begin)
        return chunks, [Segment(begin, begin, chunks.valid, 1)]
    if begin is None and cu_seqlens is None:
        T = x.shape[1]
        chunks = chunk_layout(x, min(size, T))
        return chunks, [
            Segment(None, None, chunks.valid[chunks.step(s)], min(chunks.size, T - s * chunks.size))
            for s in range(len(chunks.active))
        ]
    chunks = chunk_layout(x, size if begin is not None else min(size, x.shape[1]), cu_seqlens, begin)
    lengths, segments = chunks.valid.sum(1).tolist(), []
    for s in range(len(chunks.active)):
        of_first = chunks.sort(begin) if begin is not None and s == 0 else None
        segments.append(_ragged(x, of_first, chunks.valid[chunks.step(s)], lengths[chunks.step(s)]))
    return chunks, segments


def _ragged(x: torch.Tensor, begin: torch.Tensor | None, valid: torch.Tensor, lengths: list[int]) -> Segment:
    if min(lengths) == valid.shape[1]:
        return Segment(begin, None, valid, valid.shape[1])
    bounds = torch.tensor([0, *accumulate(lengths)])
    packed = x.new_empty(1, sum(lengths))
    # sequences that end later have no fewer tokens here: chunks are in the order that they are in already
    packing = chunk_layout(packed, valid.shape[1], bounds, begin)
    return Segment(begin, None, valid, None, packing, bounds.to(x.device, torch.int32))
