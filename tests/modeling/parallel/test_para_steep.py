"""Diagonal cells that leap: what they end with says little of what they began with, and their slopes overflow.

Both short ways of `modeling.parallel.para` look safe for them and are not; what is returned must be exact all the same.
"""

from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from riverrun.kernels.common.shooting import take_statistics
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm
from riverrun.modeling.parallel import para
from riverrun.modeling.parallel.context import Context
from tests.ranks import mesh

OPS = {"para_gru": (para_gru, para.context_para_gru), "para_lstm": (para_lstm, para.context_para_lstm)}
both = pytest.mark.parametrize("op", OPS)
D = 4


def cell(op, T, renew):
    """Gates that let σ(renew) of the new into the state, and weights: the new state is about tanh(3 h)."""
    gates = torch.zeros(1, T, 3, D, dtype=torch.float64)
    gates[:, :, 0] = renew if op == "para_gru" else -renew
    gates[:, :, 1] = 6
    weight = torch.zeros(3, D, dtype=torch.float64)
    weight[2] = 3
    return gates, [weight] if op == "para_gru" else [weight, weight.new_zeros(2, D)]


def two_stable_states(op):
    """The first token pushes the state to −1, where it stays; from zeros it would go to +1. Slopes vanish at both."""
    gates, weights = cell(op, 256, 3.0)
    gates += 0.1 * torch.randn(gates.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gates[:, 1:, 2] += 0.1
    gates[:, 0, 2] = -8
    return gates, weights


def an_unstable_rest(op):
    """The first token pushes the state off zero by next to nothing, which grows 3 ** 8 times within every shard of 8:
    the first two passes hardly move anything."""
    gates, weights = cell(op, 64, 20.0)
    gates[:, 0, 2] = 1e-13
    return gates, weights


def slopes_that_overflow(op):
    """Half of the channels stay at zero, where 3 ** 100 is more than a shard's slope can be in float32."""
    gates, weights = cell(op, 400, 20.0)
    weights[0][:, 2:] = 0.5
    gates[:, :, :, 2:] = torch.randn(1, 400, 3, 2, generator=torch.Generator().manual_seed(1))
    return gates.float(), [w.float() for w in weights]


def upstream(case, T):
    weights = torch.randn(1, T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if case is slopes_that_overflow:
        weights[..., :2] = 0
    return weights


def shared(case, op, changes, recompute=False):
    """On a rank: its h, with a gradient and without, all gradients, what the solver did, and whether the last tokens
    seemed to be enough."""
    axis = mesh(cp=torch.distributed.get_world_size()).cp
    gates, weights = CASES[case](op)
    T = gates.shape[1]
    context = Context.of_rows(axis, 1, T, [0, T], "cpu")
    bias = torch.zeros(3, D, dtype=gates.dtype)
    leaves = [t.requires_grad_() for t in (gates, *weights)]
    seemed = []

    def run(gates, *weights):
        return OPS[op][1](context, gates, *weights, bias=bias, tolerance=1e-5, then=lambda h: 2 * h) / 2

    def asked(context, *changes):
        largest = genuine(context, *changes)
        if len(changes) == 2:  # what the last tokens remember, and how far off the states are
            seemed.append(largest()[0] <= para.FORGOTTEN)
        return largest

    genuine = para._asked
    with mock.patch.multiple(para, _asked=asked, **changes):
        mine = gates[:, axis.share(T)]
        take_statistics()
        with torch.no_grad():
            alone = run(mine, *weights)
        statistics = take_statistics().get(f"{op}_over_ranks")
        h = checkpoint(run, mine, *weights, use_reentrant=False) if recompute else run(mine, *weights)
        (h * upstream(CASES[case], T)[:, axis.share(T)].to(h.dtype)).sum().backward()
    return h.detach(), alone, [x.grad for x in leaves], statistics, seemed


CASES = {f.__name__: f for f in (two_stable_states, an_unstable_rest, slopes_that_overflow)}


def assert_exact(results, case, op, tolerance):
    gates, weights = case(op)
    leaves = [t.requires_grad_() for t in (gates, *weights)]
    h, _ = OPS[op][0](gates, *weights, backend="reference")
    (h * upstream(case, h.shape[1]).to(h.dtype)).sum().backward()
    for way in (0, 1):
        assert (torch.cat([r[way] for r in results], dim=1) - h).abs().max() < tolerance
    for i, leaf in enumerate(leaves):
        error = (sum(r[2][i] for r in results) - leaf.grad).abs().max()
        assert error < tolerance * max(1, leaf.grad.abs().max()), i


@both
@pytest.mark.parametrize("recompute", [False, True])
def test_the_last_tokens_seem_to_be_enough(ranks, op, recompute):
    results = ranks(4).run(shared, "two_stable_states", op, {"BURN_IN": 32, "WORTH": 1}, recompute)
    assert all(r[4] and all(r[4]) for r in results)  # or this tests nothing
    assert_exact(results, two_stable_states, op, 1e-6)


@both
def test_states_that_seem_to_have_settled(ranks, op):
    results = ranks(8).run(shared, "an_unstable_rest", op, {})
    assert_exact(results, an_unstable_rest, op, 1e-5)
    passes = {r[3].passes for r in results}
    assert len(passes) == 1 and passes.pop() > 3, "they did not seem to"


@both
def test_slopes_that_overflow_where_there_is_no_gradient(ranks, op):
    assert_exact(ranks(4).run(shared, "slopes_that_overflow", op, {}), slopes_that_overflow, op, 1e-4)
