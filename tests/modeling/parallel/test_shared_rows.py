"""Context parallelism of models: every mixer on two and four ranks gives the loss and gradients of one process."""

import pytest

from tests.modeling.parallel.sharded import BOUNDS, SHAPES, assert_parts_make_the_whole, part
from tests.modeling.parallel.test_context import LAYOUTS

LINEAR = [
    "mamba2", "mamba2 one group, alone, tied", "gated_delta", "titans_lmm", "titans_lmm linear",
    "titans_lmm linear, no momentum", "yaad", "atlas",
]  # fmt: skip


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "titans"])  # MAC cannot
@pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("cp", [2, 4])
def test_ranks_that_share_rows_compute_as_one(ranks, shape, bounds, cp):
    assert_parts_make_the_whole(ranks(cp).run(part, shape, cp, 1, cp == 4, bounds), shape, cp, 1, bounds)


@pytest.mark.parametrize("method", ["states", "heads"])
@pytest.mark.parametrize("bounds", [BOUNDS, *LAYOUTS.values()], ids=["two rows", *LAYOUTS])
@pytest.mark.parametrize("shape", LINEAR)
def test_linear_recurrences_share_rows_both_ways(ranks, shape, bounds, method):
    results = ranks(4).run(part, shape, 4, 1, True, bounds, method)
    assert_parts_make_the_whole(results, shape, 4, 1, bounds)


@pytest.mark.parametrize("bounds", [BOUNDS, *LAYOUTS.values()], ids=["two rows", *LAYOUTS])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "attention" in shape])
def test_keys_go_round_a_ring(ranks, shape, bounds):
    results = ranks(4).run(part, shape, 4, 1, True, bounds, "auto", "ring")
    assert_parts_make_the_whole(results, shape, 4, 1, bounds)
