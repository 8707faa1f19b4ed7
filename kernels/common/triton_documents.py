"""Where documents start, as bits: for kernels that step through packed documents as through one sequence."""

import torch
import triton
import triton.language as tl


@triton.jit
def _starts_kernel(cu_seqlens, words, documents, S, num_groups, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, end = g * STEPS, g * STEPS + STEPS
    # k: the number of bounds before the group, by bisection
    k, above = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + S + 1
    for _ in range(32):
        middle = (k + above) // 2
        searching = k < above
        less = tl.load(cu_seqlens + middle, mask=searching, other=0).to(tl.int32) < begin
        k = tl.where(searching & less, middle + 1, k)
        above = tl.where(searching & ~less, middle, above)
    word = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(STEPS + 1):
        bound = tl.load(cu_seqlens + k + i, mask=k + i <= S, other=0x7FFFFFFF).to(tl.int32)
        word |= tl.where(bound <= end, 1 << tl.minimum(bound - begin, STEPS), 0)
    tl.store(words + g, word, mask=g < num_groups)
    tl.store(documents + g, k, mask=g < num_groups)


def document_starts(cu_seqlens: torch.Tensor, T: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each group of `steps` (at most 30) tokens of a row of T tokens with the (S + 1,) bounds `cu_seqlens`:

    Returns:
        words (⌈T / steps⌉,) int32: bit i is set if a document starts, or the last one has ended, at token i of the
        group; bit `steps` is the first bit of the next group. documents (⌈T / steps⌉,) int32: how many bounds lie
        before the group, so that the first start in the group is that of document `documents[group]`.
    """
    num_groups = triton.cdiv(T, steps)
    words, documents = torch.empty(2, num_groups, dtype=torch.int32, device=cu_seqlens.device)
    block = 128
    _starts_kernel[(triton.cdiv(num_groups, block),)](
        cu_seqlens, words, documents, len(cu_seqlens) - 1, num_groups, STEPS=steps, BLOCK=block, num_warps=4
    )
    return words, documents
