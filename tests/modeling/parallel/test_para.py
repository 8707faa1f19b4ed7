"""The nonlinear cells over ranks: hard weights, chains that settle and chains that do not, cells that forget."""

import gc
import weakref

import pytest
import torch

from riverrun.kernels.common.shooting import take_statistics
from riverrun.kernels.common.slope import linearise
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm
from riverrun.modeling.parallel import para
from riverrun.modeling.parallel.context import Context
from tests.ranks import mesh

ROWS, LENGTH, D = 2, 64, 6
OPS = {"para_gru": (para_gru, para.context_para_gru, 3), "para_lstm": (para_lstm, para.context_para_lstm, 5)}


def arguments(op, scale, keep):
    """Gates whose first one keeps the state the more, the larger `keep`; then the weights, and a bias."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gates, weight, bias = 2 * draw(ROWS, LENGTH, 3, D), draw(OPS[op][2], D), 0.1 * draw(3, D)
    weight = scale * weight / weight.abs().max()
    gates[:, :, 0] += keep if op == "para_lstm" else -keep
    weights = [weight] if op == "para_gru" else [weight[:3], weight[3:]]
    return [t.requires_grad_() for t in (gates, *weights, bias)]


def upstream():
    return torch.randn(ROWS, LENGTH, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def shared(op, scale, keep, bounds, changes, tolerance=1e-12):
    """On a rank: its h, all gradients, and what the solver did."""
    axis = mesh(cp=torch.distributed.get_world_size()).cp
    before = {name: getattr(para, name) for name in changes}
    for name, value in changes.items():
        setattr(para, name, value)
    try:
        take_statistics()
        context = Context.of_rows(axis, ROWS, LENGTH, bounds, "cpu")
        gates, *weights, bias = leaves = arguments(op, scale, keep)
        mine = gates[:, axis.share(LENGTH)]
        if context.cu_seqlens is not None:
            mine = mine.flatten(0, 1)[None]
        h = OPS[op][1](context, mine, *weights, bias=bias, tolerance=tolerance).view(ROWS, -1, D)
        (h * upstream()[:, axis.share(LENGTH)]).sum().backward()
        statistics = take_statistics().get(f"{op}_over_ranks")
        return h.detach(), [x.grad for x in leaves], statistics
    finally:
        for name, value in before.items():
            setattr(para, name, value)


def assert_exact(results, op, scale, keep, bounds, tolerance=1e-10):
    gates, *weights, bias = leaves = arguments(op, scale, keep)
    packed = torch.tensor(bounds, dtype=torch.int32)
    h, _ = OPS[op][0](gates.flatten(0, 1)[None], *weights, bias=bias, cu_seqlens=packed, backend="reference")
    h = h.view(ROWS, LENGTH, D)
    (h * upstream()).sum().backward()
    assert (torch.cat([r[0] for r in results], dim=1) - h).abs().max() < tolerance
    for i, leaf in enumerate(leaves):
        error = (sum(r[1][i] for r in results) - leaf.grad).abs().max()
        assert error < tolerance * max(1, leaf.grad.abs().max()), i


ONE, MIXED = [0, 64, 128], [0, 3, 40, 64, 100, 128]
both = pytest.mark.parametrize("op", OPS)


@both
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scale", [0.5, 0.9, 2.0, 3.0])
@pytest.mark.parametrize("bounds", [ONE, MIXED], ids=["one document", "several"])
def test_any_cell_is_exact(ranks, op, world, scale, bounds):
    results = ranks(world).run(shared, op, scale, 3.0, bounds, {})
    assert_exact(results, op, scale, 3.0, bounds, 1e-10 if scale < 2 else 1e-7)


@both
def test_a_chain_that_settles_stops_early(ranks, op):
    results = ranks(8).run(shared, op, 0.5, -4.0, ONE, {}, 1e-6)
    assert_exact(results, op, 0.5, -4.0, ONE, 1e-6)
    assert {(r[2].passes, r[2].fallbacks) for r in results} == {(3, 0)}


@both
def test_a_chain_that_does_not_settle_goes_to_its_end(ranks, op):
    results = ranks(4).run(shared, op, 3.0, 6.0, ONE, {"PASSES": 1})
    assert_exact(results, op, 3.0, 6.0, ONE, 1e-7)
    assert {(r[2].passes, r[2].fallbacks) for r in results} == {(3, 1)}


@both
@pytest.mark.parametrize("bounds", [ONE, MIXED], ids=["one document", "several"])
def test_forgetful_cells_look_at_the_last_tokens_only(ranks, op, bounds):
    results = ranks(4).run(shared, op, 0.5, -8.0, bounds, {"BURN_IN": 7, "WORTH": 1})
    assert_exact(results, op, 0.5, -8.0, bounds, 1e-6)
    assert {r[2].passes for r in results} == {1} and max(r[2].change for r in results) <= para.FORGOTTEN


@both
@pytest.mark.parametrize("bounds", [ONE, MIXED], ids=["one document", "several"])
def test_one_cell_that_remembers_is_enough_to_look_at_all(ranks, op, bounds):
    results = ranks(4).run(shared, op, 0.5, 4.0, bounds, {"BURN_IN": 7, "WORTH": 1})
    assert_exact(results, op, 0.5, 4.0, bounds)
    assert all(r[2] is None or r[2].change > 0 for r in results)


def test_what_slopes_are_made_of_is_freed_at_once():
    """Not when the garbage collector finds it: by then a GPU's memory is full."""
    made = []

    def solve(initial):
        final = torch.tanh(initial)  # whose gradient is made of what it gave, as those of the cells are
        made.append(weakref.ref(final))
        return final

    gc.disable()
    try:
        linearise(solve, torch.zeros(ROWS, 1, D))
        assert made[0]() is None
    finally:
        gc.enable()
