"""The causal convolution on rows that two and four ranks share, against the op on the whole rows."""

import pytest
import torch

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.conv import with_inputs_before
from riverrun.modeling.parallel.mesh import Axis
from tests.modeling.parallel import rows
from tests.modeling.parallel.rows import LENGTH, ROWS, Case
from tests.modeling.parallel.test_context import LAYOUTS

D = 3


def of_taps(W, bias=True, activation="silu"):
    def make():
        weight = torch.randn(D, W, dtype=torch.float64)
        return [weight, torch.randn(D, dtype=torch.float64)] if bias else [weight]

    def shared(context, x, weight, bias=None):
        parts, befores = zip(*with_inputs_before(context, x.split([1, D - 1], dim=-1), W))
        x, before = torch.cat(parts, dim=-1), None if befores[0] is None else torch.cat(befores, dim=-1)
        return causal_conv1d(
            x, weight, bias, activation=activation, initial_state=before, cu_seqlens=context.cu_seqlens
        )[0]  # fmt: skip

    def whole(cu_seqlens, x, weight, bias=None):
        return causal_conv1d(x, weight, bias, activation=activation, cu_seqlens=cu_seqlens, backend="reference")[0]

    return Case(lambda: [torch.randn(ROWS, LENGTH, D, dtype=torch.float64)], make, whole, shared)


CASES = {
    "one tap": of_taps(1),
    "two taps, no bias": of_taps(2, bias=False),
    "four taps": of_taps(4),
    "a shard and a token": of_taps(5, activation=None),
}


def part(name, *args):
    return rows.part(CASES[name], *args)


@pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cp", [2, 4])
def test_shards_equal_the_whole(ranks, cp, name, bounds):
    rows.assert_parts_make_the_whole(ranks(cp).run(part, name, bounds, cp), CASES[name], bounds)


def test_shards_that_are_too_short():
    context = Context.of_rows(Axis(4, 1), ROWS, LENGTH, [0, LENGTH, ROWS * LENGTH], "cpu")
    with pytest.raises(ValueError, match=r"shards of 4 tokens a row are shorter than the 5 .* lower parallel\.cp"):
        with_inputs_before(context, [torch.zeros(ROWS, 4, D)], 6)


def test_short_shards_of_whole_documents():
    """Nothing crosses, so nothing is asked of the other ranks."""
    bounds = list(range(0, ROWS * LENGTH + 1, 4))
    context = Context.of_rows(Axis(4, 1), ROWS, LENGTH, bounds, "cpu")
    assert with_inputs_before(context, (x := torch.randn(ROWS, 4, D),), 6) == [(x, None)]
