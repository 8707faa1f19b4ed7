"""Sequences in segments that are walked side by side, where there are too few sequences and heads to fill a GPU.

A linear recurrence takes the state at a segment's start to that at its end by an affine map. So: one walk finds the
maps of all segments, a short one along each sequence applies them to find the states between segments, and then each
segment is walked as a sequence of its own, from its own state. That is about three times the work, side by side.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from riverrun.kernels.common.documents import once_a_batch
from riverrun.kernels.common.triton_chunks import Chunks, cut, pieces
from riverrun.kernels.common.whole import ceil_div

WORTH = 4  # segments that there must be room for, at least
LEAST_CHUNKS = 16  # of a segment: fewer are walked sooner than cut


class Segments(NamedTuple):
    """
    Attributes:
        chunks: of the segments as sequences. How many there are is an upper bound; those too many are empty.
        first: (S + 1,) int32, how many segments lie before each sequence.
        inner_end, inner_start: (segments,) bool, whether a segment ends, or starts, within its sequence.
    """

    chunks: Chunks
    first: torch.Tensor
    inner_end: torch.Tensor
    inner_start: torch.Tensor

    def of_ends(self, states: torch.Tensor) -> torch.Tensor:
        """From the states after the segments those after the sequences (S, …)."""
        return states.index_select(0, self.first[1:] - 1)

    def of_starts(self, states: torch.Tensor) -> torch.Tensor:
        """From the states before the segments those before the sequences (S, …)."""
        return states.index_select(0, self.first[:-1])


def segment(x: torch.Tensor, size: int, walkers: int, room: int, cu_seqlens: torch.Tensor | None) -> Segments | None:
    """Segments of a batch `x` (B, T, …), or of the documents of its one row, in whole chunks of `size` tokens.

    Args:
        walkers: programs that walk along one sequence.
        room: programs that the device runs at a time.

    Returns:
        None if the sequences as they are leave too little room. This depends on shapes alone.
    """
    B, T = x.shape[:2]
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    if sequences * walkers * WORTH > room:
        return None
    length = max(LEAST_CHUNKS, ceil_div(ceil_div(B * T * walkers, room), size)) * size
    if length * WORTH > B * T:
        return None
    if cu_seqlens is not None:
        return _segments(cu_seqlens.to(torch.int32), size, length, B * T)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()  # nothing is computed yet that could be kept
    return (_of_rows.__wrapped__ if capturing else _of_rows)(B, T, size, length, x.device)


@lru_cache(maxsize=32)  # a dozen small kernels, which would take the host longer than the walks take the device
def _of_rows(B: int, T: int, size: int, length: int, device: torch.device) -> Segments:
    return _segments(torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=device), size, length, B * T)


@once_a_batch
def _segments(bounds: torch.Tensor, size: int, length: int, tokens: int) -> Segments:
    """Segments of at most `length` of the sequences with bounds (S + 1,)."""
    num_segments = tokens // length + len(bounds) - 1
    first, start, _, sequence = pieces(bounds, length, num_segments)
    index = torch.arange(num_segments, dtype=torch.int32, device=bounds.device)
    starts = torch.cat([start, bounds[-1:]]).clamp_max_(tokens)
    one_row = bounds.new_empty(1).expand(1, tokens)
    return Segments(cut(one_row, size, starts), first, index < first[sequence + 1] - 1, index > first[sequence])
