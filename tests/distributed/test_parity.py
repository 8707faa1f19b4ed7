"""Every layout trains as one process does: losses, gradient norms and weights after some steps, to rounding."""

import functools

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.parallel.sharding import meta_model, parameter_plan
from tests.distributed import parity_workers
from tests.modeling.parallel.sharded import SHAPES

MIXERS = [
    "mamba2", "gated_delta", "para_gru", "para_lstm", "slstm", "lstm", "gru, elman", "prefix_linear_attention",
    "titans_lmm, no norm", "attention",
]  # fmt: skip
LAYOUTS = [
    # world, cp, tp, ZeRO stage, accumulation, recompute
    (2, 1, 2, 1, 1, False),
    (2, 1, 2, 2, 2, True),
    (2, 1, 2, 3, 1, True),
    (4, 1, 2, 1, 2, True),
    (4, 1, 2, 2, 1, False),
    (4, 1, 2, 3, 2, False),
    (4, 1, 4, 1, 2, False),
    (2, 2, 1, 1, 2, True),
    (2, 2, 1, 2, 1, False),
    (2, 2, 1, 3, 1, True),
    (4, 2, 1, 1, 1, False),
    (4, 2, 1, 3, 2, True),
    (4, 4, 1, 2, 1, True),
    (4, 2, 2, 1, 2, True),
    (4, 2, 2, 2, 1, False),
    (4, 2, 2, 3, 1, True),
]


def name(layout):
    world, cp, tp, stage, accumulation, recompute = layout
    dp = world // (cp * tp)
    return f"dp{dp} cp{cp} tp{tp} ZeRO-{stage} x{accumulation}" + " recompute" * recompute


def assert_parity(ranks, shape, layout):
    world, *options = layout
    results = ranks(world).run(parity_workers.train, shape, *options)
    losses, norms, held_out, weights, _ = alone(ranks, shape)
    plan = parameter_plan(meta_model(RiverrunConfig.from_options(SHAPES[shape])), options[1])
    assert min(norms) > 0.5, "clipping must matter"
    for got in results:
        assert got[0] == pytest.approx(losses, rel=2e-6)
        assert got[1] == pytest.approx(norms, rel=2e-5)
        assert got[2] == pytest.approx(held_out, rel=1e-5)
        same = next(other for other in results if other[4] == got[4])
        assert all(torch.equal(w, same[3][n]) for n, w in got[3].items()), "peers must have the same bits"
    shards = [next(r[3] for r in results if r[4] == t) for t in range(options[1])]
    for n, weight in weights.items():
        parts, split = [s[n] for s in shards], plan[n]
        for part in parts:
            whole = part if split is None else split.join(parts)
            assert (whole - weight).abs().max() < 1e-5, n  # of steps of up to 2e-2


@functools.cache
def alone(ranks, shape):
    (result,) = ranks(1).run(parity_workers.train, shape, 1, 1, 1, 1, False)
    return result


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_layouts(ranks, layout):
    assert_parity(ranks, "hybrid", layout)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_reduced_during_the_backward_pass(ranks, stage):
    assert_parity(ranks, "hybrid", (4, 1, 2, stage, 2, True, True))


@pytest.mark.parametrize("shape", MIXERS)
def test_mixers(ranks, shape):
    assert_parity(ranks, shape, (4, 2, 2, 1, 1, True))


@pytest.mark.parametrize("layout", [(2, 1, 2, 2, 2, True), (2, 2, 1, 1, 1, False), (4, 2, 2, 3, 1, True)], ids=name)
def test_layers_that_are_shared_by_all_steps(ranks, layout):
    """Whose positions halt one by one; ZeRO-3 gathers them once a pass."""
    assert_parity(ranks, "universal", layout)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memories_of_all_kinds(ranks, stage):
    """Whose parameters are used outside of their modules' `forward`, which ZeRO-3 has to notice."""
    assert_parity(ranks, "titans", (4, 1, 2, stage, 2, True))
