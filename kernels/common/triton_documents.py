"""Where packed documents start and end, for kernels that step through them as through one sequence: as bits, or as
distances."""

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.documents import once_a_batch
from riverrun.kernels.common.whole import ceil_div


@triton.jit
def _bounds_before(cu_seqlens, at, S):
    """How many of the S + 1 bounds lie before the tokens `at`, by bisection."""
    k, above = tl.zeros_like(at), tl.zeros_like(at) + S + 1
    for _ in range(32):
        middle = (k + above) // 2
        searching = k < above
        less = tl.load(cu_seqlens + middle, mask=searching, other=0).to(tl.int32) < at
        k = tl.where(searching & less, middle + 1, k)
        above = tl.where(searching & ~less, middle, above)
    return k


@triton.jit(do_not_specialize=["S", "num_groups"])
def _starts_kernel(cu_seqlens, words, documents, S, num_groups, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, end = g * STEPS, g * STEPS + STEPS
    k = _bounds_before(cu_seqlens, begin, S)
    word = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(STEPS + 1):
        bound = tl.load(cu_seqlens + k + i, mask=k + i <= S, other=0x7FFFFFFF).to(tl.int32)
        word |= tl.where(bound <= end, 1 << tl.minimum(bound - begin, STEPS), 0)
    tl.store(words + g, word, mask=g < num_groups)
    tl.store(documents + g, k, mask=g < num_groups)


@once_a_batch
def document_starts(cu_seqlens: torch.Tensor, T: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each group of `steps` (at most 30) tokens of a row of T tokens with the (S + 1,) bounds `cu_seqlens`:

    Returns:
        words (⌈T / steps⌉,) int32: bit i is set if a document starts, or the last one has ended, at token i of the
        group; bit `steps` is the first bit of the next group. documents (⌈T / steps⌉,) int32: how many bounds lie
        before the group, so that the first start in the group is that of document `documents[group]`.
    """
    num_groups = ceil_div(T, steps)
    words, documents = torch.empty(2, num_groups, dtype=torch.int32, device=cu_seqlens.device)
    block = 128
    _starts_kernel[(ceil_div(num_groups, block),)](
        cu_seqlens, words, documents, len(cu_seqlens) - 1, num_groups, STEPS=steps, BLOCK=block, num_warps=4
    )
    return words, documents


@triton.jit(do_not_specialize=["S", "T"])
def _positions_kernel(cu_seqlens, positions, S, T, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = t < T
    s = tl.where(within, _bounds_before(cu_seqlens, t + 1, S) - 1, 0)
    tl.store(positions + t, s, mask=within)
    tl.store(positions + T + t, t - tl.load(cu_seqlens + s).to(tl.int32), mask=within)
    tl.store(positions + T * 2 + t, tl.load(cu_seqlens + s + 1).to(tl.int32) - t, mask=within)


@once_a_batch
def document_positions(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """For each token of a row of T tokens with the (S + 1,) bounds `cu_seqlens`: its document, how many tokens of that
    lie before it, and how many from it on, which are at least 1; (3, T) int32."""
    positions = torch.empty(3, T, dtype=torch.int32, device=cu_seqlens.device)
    block = 128
    _positions_kernel[(ceil_div(T, block),)](cu_seqlens, positions, len(cu_seqlens) - 1, T, BLOCK=block, num_warps=4)
    return positions
