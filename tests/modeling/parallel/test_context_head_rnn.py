"""Dense-head cells on rows that two and four ranks share, against the op on the whole rows; and who waits for whom."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from riverrun.kernels.head_rnn import head_rnn
from riverrun.kernels.head_rnn.cells import CELLS
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.head_rnn import context_head_rnn
from tests.modeling.parallel import rows
from tests.modeling.parallel.rows import LENGTH, ROWS, Case
from tests.modeling.parallel.test_context import LAYOUTS
from tests.ranks import mesh

H, K = 2, 3
ONE = LAYOUTS["one document a row"]
every_cell = pytest.mark.parametrize("cell", CELLS)


def made(cell, layers):
    G = len(CELLS[cell].gates)
    # forget gates of both signs, and weights that are no contraction
    return (
        lambda: [2 * torch.randn(ROWS, LENGTH, G, H, K, dtype=torch.float64)],
        lambda: [torch.randn(G, H, K, K, dtype=torch.float64) for _ in range(layers)],
    )


def of_cell(cell):
    def whole(cu_seqlens, gates, weight):
        return head_rnn(gates, weight, cell, cu_seqlens=cu_seqlens, backend="reference")[0]

    return Case(*made(cell, 1), whole, lambda context, gates, weight: context_head_rnn(context, gates, weight, cell))


def of_layers(cell, together):
    """Two layers, the first one's h added to the second one's gates. Where shared, under checkpoints in which nothing
    comes after the op: one of each layer, or one of both `together`."""
    op = of_cell(cell)

    def layers(run, gates, first, second):
        return run(gates + run(gates, first)[:, :, None], second)

    def whole(cu_seqlens, *args):
        return layers(partial(op.whole, cu_seqlens), *args)

    def shared(context, *args):
        run = partial(op.shared, context)
        recomputed = partial(checkpoint, use_reentrant=False)
        return recomputed(layers, run, *args) if together else layers(partial(recomputed, run), *args)

    return Case(*made(cell, 2), whole, shared)


CASES = {cell: of_cell(cell) for cell in CELLS} | {
    f"{cell}, recomputed{' together' * together}": of_layers(cell, together) for cell in CELLS for together in (0, 1)
}


def part(name, *args):
    return rows.part(CASES[name], *args)


@every_cell
@pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("cp", [2, 4])
def test_ranks_that_share_rows_compute_as_one(ranks, cell, bounds, cp):
    rows.assert_parts_make_the_whole(ranks(cp).run(part, cell, bounds, cp), CASES[cell], bounds)


@every_cell
def test_in_single_precision(ranks, cell):
    parts = ranks(4).run(part, cell, ONE, 4, "auto", torch.float32)
    rows.assert_parts_make_the_whole(parts, CASES[cell], ONE, torch.float32, 1e-4)


@every_cell
@pytest.mark.parametrize("bounds", [ONE, LAYOUTS["a document over all shards, and a short one"]])
@pytest.mark.parametrize("together", ["", " together"])
def test_layers_that_are_recomputed(ranks, cell, bounds, together):
    """A rank that waited for a gradient before it recomputed, or that ended its recomputation before it sent its state,
    would wait for good."""
    name = f"{cell}, recomputed{together}"
    rows.assert_parts_make_the_whole(ranks(4).run(part, name, bounds, 4), CASES[name], bounds)


def of_frozen(frozen):
    """On a rank: whichever gradients there are, with the gates or the weight frozen."""
    axis = mesh(cp=4).cp
    context = Context.of_rows(axis, ROWS, LENGTH, ONE, "cpu")
    (gates,), (weight,) = rows.arguments(CASES["slstm"], torch.float64)
    leaf = weight if frozen == "gates" else gates
    leaf.requires_grad_()
    context_head_rnn(context, gates[:, axis.share(LENGTH)], weight, "slstm").square().sum().backward()
    return leaf.grad


@pytest.mark.parametrize("frozen", ["gates", "weight"])
def test_the_gradient_goes_back_whatever_is_frozen(ranks, frozen):
    parts = ranks(4).run(of_frozen, frozen)
    (gates,), (weight,) = rows.arguments(CASES["slstm"], torch.float64)
    leaf = weight if frozen == "gates" else gates
    leaf.requires_grad_()
    head_rnn(gates, weight, "slstm", backend="reference")[0].square().sum().backward()
    torch.testing.assert_close(sum(parts), leaf.grad)


def messages(bounds):
    """On a rank: how often it waits for a message and sends one, forward and backward."""
    with (
        mock.patch.object(dist, "recv", wraps=dist.recv) as recv,
        mock.patch.object(dist, "send", wraps=dist.send) as send,
    ):
        rows.part(CASES["gru"], bounds, 4)  # forward, backward, and forward without a gradient
        return recv.call_count, send.call_count


def test_only_documents_that_cross_make_ranks_wait(ranks):
    assert ranks(4).run(messages, [0, 4, 8, 12, 16, 20, 24, 28, 32]) == [(0, 0)] * 4
    # from the second shard to the third, in the second row alone: two states and a gradient
    assert ranks(4).run(messages, [0, 4, 8, 12, 16, 20, 28, 32]) == [(0, 0), (1, 2), (2, 1), (0, 0)]
