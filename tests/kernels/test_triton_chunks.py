"""Where kernels find sequences and chunks."""

import pytest
import torch
import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk, cut, sequence


@triton.jit
def read_kernel(cu, first, start, length, sequences, chunks, T, S, M, Q: tl.constexpr, PACKED: tl.constexpr):
    for s in range(S):
        begin, tokens, c = sequence(cu, first, s, T, Q, PACKED)
        tl.store(sequences + 3 * s, begin)
        tl.store(sequences + 3 * s + 1, tl.cast(tokens, tl.int64))
        tl.store(sequences + 3 * s + 2, c)
    for c in range(M):
        token, tokens = chunk(start, length, c, T, Q, PACKED)
        tl.store(chunks + 2 * c, token)
        tl.store(chunks + 2 * c + 1, tl.cast(tokens, tl.int64))


@pytest.mark.parametrize("B, bounds", [(3, None), (1, [0, 1, 2, 34, 50, 51]), (1, [0, 51]), (1, [0, 16, 32, 51])])
def test_sequences_and_chunks(B, bounds):
    T, Q = 51, 16
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    found = cut(torch.zeros(B, T, 2), Q, cu_seqlens)
    sequences = torch.empty(found.num_sequences, 3, dtype=torch.int64)
    chunks = torch.empty(found.num_chunks, 2, dtype=torch.int64)
    read_kernel[(1,)](
        *found.tensors, sequences, chunks, T, found.num_sequences, found.num_chunks, Q=Q, PACKED=found.packed
    )
    ends = [T * (b + 1) for b in range(B)] if bounds is None else bounds[1:]
    begins = [0, *ends[:-1]]
    want = [(t, min(Q, end - t)) for begin, end in zip(begins, ends) for t in range(begin, end, Q)]
    counts = [-(-(end - begin) // Q) for begin, end in zip(begins, ends)]
    assert sequences.tolist() == [[b, e - b, sum(counts[:i])] for i, (b, e) in enumerate(zip(begins, ends))]
    assert list(map(tuple, chunks.tolist()))[: len(want)] == want
    assert not chunks[len(want) :, 1].any()
