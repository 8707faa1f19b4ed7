"""The chunk layout: split and join are inverse and adjoint, and a scan sees every sequence's chunks in order."""

import itertools

import pytest
import torch

from riverrun.kernels.common.chunks import chunk_layout, sequence_bounds

LAYOUTS = [  # batch size, T, chunk size, document lengths
    (1, 1, 4, None),
    (2, 8, 4, None),
    (3, 10, 4, None),
    (2, 3, 8, None),
    (1, 12, 4, [12]),
    (1, 12, 4, [4, 8]),
    (1, 17, 4, [1, 9, 1, 4, 2]),
    (1, 5, 1, [1, 3, 1]),
]


def bounds_of(lengths):
    return None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("B, T, size, lengths", LAYOUTS)
def test_join_inverts_split(B, T, size, lengths):
    x = torch.randn(B, T, 2, 3)
    chunks = chunk_layout(x, size, bounds_of(lengths))
    parts = chunks.split(x)
    assert parts.shape == (sum(chunks.active), size, 2, 3)
    assert (parts[~chunks.valid] == 0).all()
    assert torch.equal(chunks.join(parts), x)
    assert int(chunks.valid.sum()) == B * T


@pytest.mark.parametrize("B, T, size, lengths", LAYOUTS)
def test_chunks_follow_their_sequence(B, T, size, lengths):
    """Each sequence's chunks, found through `step`, `active` and `order`, spell its tokens in order."""
    x = torch.arange(B * T).view(B, T)
    cu_seqlens = bounds_of(lengths)
    chunks = chunk_layout(x, size, cu_seqlens)
    bounds = sequence_bounds(x, cu_seqlens).tolist()
    parts, found = chunks.split(x), [[] for _ in chunks.order]
    for s, active in enumerate(chunks.active):
        rows, valid = parts[chunks.step(s)], chunks.valid[chunks.step(s)]
        assert len(rows) == active
        for i in range(active):
            found[int(chunks.order[i])] += rows[i][valid[i]].tolist()
    assert found == [list(range(start, end)) for start, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("B, T, size, lengths", LAYOUTS)
def test_split_and_join_gradients(B, T, size, lengths):
    x = torch.randn(B, T, 2, dtype=torch.float64, requires_grad=True)
    chunks = chunk_layout(x, size, bounds_of(lengths))
    parts = torch.randn(*chunks.index.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(chunks.split, x)
    assert torch.autograd.gradcheck(chunks.join, parts)
    assert torch.autograd.gradgradcheck(chunks.split, x)


@pytest.mark.parametrize("B, T, size, lengths", LAYOUTS)
def test_scan(B, T, size, lengths):
    """A running sum over chunks: each chunk starts from the sum of what came before it in its own sequence."""
    x = torch.randn(B, T, dtype=torch.float64)
    cu_seqlens = bounds_of(lengths)
    chunks = chunk_layout(x, size, cu_seqlens)
    initial = torch.randn(len(chunks.order), dtype=torch.float64)
    starts, final = chunks.scan(lambda h, added: h + added, initial, chunks.split(x).sum(1))
    inside = chunks.join(starts[:, None] + chunks.split(x).cumsum(1)).flatten()
    bounds = sequence_bounds(x, cu_seqlens).tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        torch.testing.assert_close(inside[start:end], initial[i] + x.flatten()[start:end].cumsum(0))
        torch.testing.assert_close(final[i], initial[i] + x.flatten()[start:end].sum())
    assert torch.equal(chunks.unsort(chunks.sort(initial)), initial)


@pytest.mark.parametrize(
    "B, T, cu_seqlens",
    [(2, 4, [0, 4]), (1, 4, [0, 3]), (1, 4, [1, 4]), (1, 4, [0, 2, 2, 4]), (1, 4, [0, 3, 2, 4]), (1, 4, [0])],
)
def test_bad_cu_seqlens(B, T, cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens"):
        chunk_layout(torch.zeros(B, T), 4, torch.tensor(cu_seqlens))


def test_bad_size_and_empty_batch():
    with pytest.raises(ValueError, match="chunk size"):
        chunk_layout(torch.zeros(1, 4), 0)
    with pytest.raises(ValueError, match="at least one"):
        chunk_layout(torch.zeros(1, 0), 4)
