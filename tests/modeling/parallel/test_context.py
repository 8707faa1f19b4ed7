"""What a rank knows of its shard, against the definition token by token; and the fold of affine summaries."""

import itertools

import pytest
import torch

from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import Axis
from tests.ranks import mesh

LAYOUTS = {
    "one document a row": [0, 16, 32],
    "starts on shard edges": [0, 4, 12, 16, 24, 32],
    "starts everywhere": [0, 1, 2, 5, 7, 8, 11, 16, 17, 18, 19, 20, 31, 32],
    "a document over all shards, and a short one": [0, 1, 16, 31, 32],
    "length one": list(range(33)),
}


@pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shard_by_token(bounds, size):
    rows, length = 2, 16
    document = [sum(b <= t for b in bounds) for t in range(rows * length)]
    T = length // size
    for rank in range(size):
        context = Context.of_rows(Axis(size, rank), rows, length, bounds, "cpu")
        tokens = [b * length + rank * T + i for b in range(rows) for i in range(T)]
        pieces = [list(g) for _, g in itertools.groupby(tokens, key=lambda t: (t // length, document[t]))]
        if context.cu_seqlens is None:
            assert len(pieces) == rows
        else:
            assert context.cu_seqlens.diff().tolist() == [len(p) for p in pieces]
        row_of = [p[0] // length for p in pieces]
        assert context.first.tolist() == [row_of.index(b) for b in range(rows)]
        assert context.last.tolist() == [len(row_of) - 1 - row_of[::-1].index(b) for b in range(rows)]
        for b, r in itertools.product(range(rows), range(size)):
            start = b * length + r * T
            joined = r > 0 and document[start] == document[start - 1]
            assert context.joins[r][b] == joined
            assert context.passes[r][b] == (joined and len(set(document[start : start + T])) == 1)
        x = torch.tensor(tokens).view(1, -1) if context.cu_seqlens is not None else torch.tensor(tokens).view(rows, T)
        assert context.tail(x).flatten().tolist() == [t for i in context.last.tolist() for t in pieces[i]]
        if context.tail_seqlens is not None:
            assert context.tail_seqlens.diff().tolist() == [len(pieces[i]) for i in context.last.tolist()]


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match="multiple of 3"):
        Context.of_rows(Axis(3, 0), 1, 16, [0, 16], "cpu")


def fold(bounds):
    """h_t = a_t h_{t−1} + x_t by documents: the incoming states of this rank's shard, and gradients."""
    cp = mesh(cp=4).cp
    context = Context.of_rows(cp, 2, 16, bounds, "cpu")
    x, a = (t.requires_grad_() for t in inputs())
    mine = [slice(b * 16 + cp.rank * 4, b * 16 + cp.rank * 4 + 4) for b in range(2)]
    summaries = []
    for piece in mine:
        h, product = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        for t in range(piece.start, piece.stop):
            if t in bounds:
                h, product = torch.zeros_like(h), torch.zeros_like(h)
            h, product = a[t] * h + x[t], product * a[t]
        summaries.append((h, product))
    added, transfer = (torch.stack(part) for part in zip(*summaries))
    state = context.incoming(added, transfer)
    (state * (1 + cp.rank)).sum().backward()
    return state.detach(), x.grad, a.grad


def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 32, 3, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS)
def test_incoming_states_are_those_of_the_recurrence(ranks, bounds):
    results = ranks(4).run(fold, bounds)
    x, a = (t.requires_grad_() for t in inputs())
    h, states, loss = torch.zeros(3, dtype=torch.float64), {}, 0
    for t in range(32):
        if t in bounds:
            h = torch.zeros_like(h)
        states[t] = h
        h = a[t] * h + x[t]
    for rank, (state, *_) in enumerate(results):
        want = torch.stack([states[b * 16 + rank * 4] for b in range(2)])
        torch.testing.assert_close(state, want.detach())
        loss = loss + (want * (1 + rank)).sum()
    if loss.requires_grad:
        loss.backward()
    for leaf, grads in ((x, [r[1] for r in results]), (a, [r[2] for r in results])):
        want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(sum(torch.zeros_like(leaf) if g is None else g for g in grads), want)
