"""Recurrent depth on ranks that share weights and rows: the loss and every gradient of one process, in double
precision, from initial states of the rows' keys."""

import pytest

from tests.modeling.parallel.sharded import BOUNDS, assert_parts_make_the_whole, part


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("shape", ["core of attention", "core of gated_delta"])
@pytest.mark.parametrize(("cp", "tp"), [(1, 2), (2, 1), (2, 2)], ids=["tp2", "cp2", "cp2 tp2"])
def test_ranks_compute_as_one(ranks, shape, cp, tp, recompute):
    results = ranks(cp * tp).run(part, shape, cp, tp, recompute, BOUNDS)
    assert_parts_make_the_whole(results, shape, cp, tp, BOUNDS)
