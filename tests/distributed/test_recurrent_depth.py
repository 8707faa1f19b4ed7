"""Training with recurrent depth is one process' training on any layout: the same rows go the same number of times
through the core, from the same initial states."""

import functools

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.parallel.sharding import meta_model, parameter_plan
from tests.distributed import depth_workers
from tests.distributed.depth_workers import SHAPES


@functools.cache
def alone(ranks, shape):
    (result,) = ranks(1).run(depth_workers.train, shape, 1, 1, 1, False)
    return result


def assert_parity(ranks, shape, world, cp, tp, stage, recompute):
    results = ranks(world).run(depth_workers.train, shape, cp, tp, stage, recompute)
    assert_same_training(ranks, shape, results, cp, tp)


def assert_same_training(ranks, shape, results, cp=1, tp=1):
    losses, norms, held_out, weights, _, depths, noted = alone(ranks, shape)
    assert len({str(steps) for steps in depths}) > 1 and max(n for step in depths for n, _ in step) > 0
    plan = parameter_plan(meta_model(RiverrunConfig.from_options(SHAPES[shape])), tp)
    assert min(norms) > 0.5, "clipping must matter"
    for got in results:
        assert got[0] == pytest.approx(losses, rel=2e-6)
        assert got[1] == pytest.approx(norms, rel=2e-5)
        assert got[2] == pytest.approx(held_out, rel=1e-5)
        assert got[5] == depths
        same = next(other for other in results if other[4] == got[4])
        assert all(torch.equal(w, same[3][n]) for n, w in got[3].items()), "peers must have the same bits"
    shards = [next(r[3] for r in results if r[4] == t) for t in range(tp)]
    for n, weight in weights.items():
        parts, split = [s[n] for s in shards], plan[n]
        for part in parts:
            whole = part if split is None else split.join(parts)
            assert (whole - weight).abs().max() < 1e-5, n  # of steps of up to 2e-2
    assert_noted(noted, [got[6] for got in results], shared=cp > 1 or tp > 1)


def assert_noted(alone, parts, shared):
    """Sums and counts of the ranks together are those of one process."""
    names = {"depth_change", "depth_norm"} | (set() if shared else {"depth_correlation"})
    for part in parts:
        assert part.keys() == names
    for name in names:
        value, count = (sum(part[name][i] for part in parts) for i in (0, 1))
        assert (value, count) == (pytest.approx(alone[name][0], rel=1e-4, abs=1e-4), alone[name][1])


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages(ranks, stage, recompute):
    assert_parity(ranks, "hybrid", 2, 1, 1, stage, recompute)


@pytest.mark.parametrize(
    ("shape", "cp", "tp", "stage"),
    [("attention", 1, 2, 3), ("attention", 2, 1, 2), ("hybrid", 1, 2, 1), ("hybrid", 2, 1, 3)],
)
def test_ranks_that_share_weights_or_rows(ranks, shape, cp, tp, stage):
    assert_parity(ranks, shape, 2, cp, tp, stage, True)


def test_all_axes_at_once(ranks):
    assert_parity(ranks, "attention", 4, 2, 2, 1, False)


def test_compiled_iterations(ranks):
    results = ranks(1).run(depth_workers.train_compiled, "attention", 1)
    assert_same_training(ranks, "attention", results)
