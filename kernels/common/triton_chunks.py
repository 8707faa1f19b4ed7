"""Chunks of sequences for Triton kernels: where a sequence lies, and where a chunk does.

A *sequence* is a row of a (B, T, …) batch or a document of a packed row; tokens are counted through the whole batch, so
that row b begins at b · T. Chunks never straddle sequences: each sequence has ⌈length / Q⌉ of them, the last one short.
They are counted through all sequences. Rows need no table. For packed documents one is made on the device, without
waiting for it: how many chunks there are is not known then, only that T // Q + S is enough; those beyond are empty.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.documents import once_a_batch
from riverrun.kernels.common.whole import ceil_div


class Chunks(NamedTuple):
    """What kernels need to find sequences and chunks.

    Attributes:
        num_sequences: S.
        num_chunks: M, an upper bound if packed.
        tensors: (cu_seqlens, first, start, length), for `sequence` and `chunk` below: the (S + 1,) bounds, the (S + 1,)
            counts of chunks before each sequence, the (M,) first tokens of the chunks and their (M,) numbers of tokens.
            Without documents any tensors, which are not read.
        packed: there are documents.
    """

    num_sequences: int
    num_chunks: int
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    packed: bool


def cut(x: torch.Tensor, size: int, cu_seqlens: torch.Tensor | None) -> Chunks:
    """The chunks of `size` tokens of a batch `x` (B, T, …), or of the documents of its one row."""
    B, T = x.shape[:2]
    if cu_seqlens is None:
        return Chunks(B, B * ceil_div(T, size), (x, x, x, x), False)
    bounds = cu_seqlens.to(torch.int32)
    num_chunks = T // size + len(bounds) - 1
    first, start, length, _ = pieces(bounds, size, num_chunks)
    return Chunks(len(bounds) - 1, num_chunks, (bounds, first, start, length), True)


@once_a_batch
def pieces(
    bounds: torch.Tensor, size: int, num_pieces: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences with bounds (S + 1,) in pieces of `size`, the last of each shorter: how many lie before each sequence
    (S + 1,); and of each of `num_pieces`, its start, its length and its sequence. Those too many are empty."""
    first = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + (size - 1)) // size, 0, dtype=torch.int32, out=first[1:])
    index = torch.arange(num_pieces, dtype=torch.int32, device=bounds.device)
    sequence = torch.searchsorted(first[1:], index, right=True).clamp_max_(len(bounds) - 2)
    start = bounds[sequence] + (index - first[sequence]) * size
    length = (bounds[sequence + 1] - start).clamp_(0, size)
    return first, start, length, sequence


@triton.jit
def sequence(cu_seqlens, first, s, T, Q: tl.constexpr, PACKED: tl.constexpr):
    """Of sequence s: its first token, how many it has, and its first chunk, as 64-bit numbers but for the second."""
    if PACKED:
        begin = tl.load(cu_seqlens + s)
        return begin.to(tl.int64), tl.load(cu_seqlens + s + 1) - begin, tl.load(first + s).to(tl.int64)
    else:
        return tl.cast(s, tl.int64) * T, T, tl.cast(s, tl.int64) * tl.cdiv(T, Q)


@triton.jit
def chunk(start, length, c, T, Q: tl.constexpr, PACKED: tl.constexpr):
    """Of chunk c: its first token (64 bits), and how many it has."""
    if PACKED:
        return tl.load(start + c).to(tl.int64), tl.load(length + c)
    else:
        per_row = tl.cdiv(T, Q)
        at = (c % per_row) * Q
        return tl.cast(c // per_row, tl.int64) * T + at, tl.minimum(T - at, Q)
