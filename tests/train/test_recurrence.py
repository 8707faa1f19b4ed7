"""How deep steps go, and which rows go so deep: functions of the seed and the step alone."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from riverrun.modeling.depth.counts import RecurrenceDistribution
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.statistics import take_noted
from riverrun.train import metrics
from riverrun.train.config import RecurrenceConfig
from riverrun.train.data.loader import PackedLoader
from riverrun.train.data.packing import Row, collate
from riverrun.train.depth_monitor import LossByDepth, signature
from riverrun.train.recipe import RecipeError, difference, load_recipe
from riverrun.train.recurrence import Recurrence

DEPTH = DepthOptions(mean_recurrence=8, backprop_depth=4)


def recurrence(seed=0, depth=DEPTH, **config):
    return Recurrence(depth, RecurrenceConfig(**config), seed)


def test_draws_follow_from_seed_and_place():
    """Any step's can be had without those before; and others differ."""
    whole = [recurrence().steps(place, 4) for place in range(20)]
    assert [recurrence().steps(place, 4) for place in reversed(range(20))] == whole[::-1]
    assert len({str(steps) for steps in whole}) > 15
    assert recurrence(seed=1).steps(3, 4) != whole[3]


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_micro_batches_share_out_the_distribution(micro_batches):
    """One in each M-th of it; and each alone is distributed as if it were."""
    found, steps = RecurrenceDistribution(DEPTH), 6000 // micro_batches
    below = np.concatenate([[0], np.cumsum(found.pmf)])
    first, every = Counter(), Counter()
    for place in range(steps):
        drawn = [n + k for n, k in recurrence().steps(place, micro_batches)]
        for part, count in enumerate(sorted(drawn)):  # the part [part/M, (part + 1)/M) is among the quantiles of count
            assert below[count] < (part + 1) / micro_batches and below[count + 1] > part / micro_batches
        first[drawn[0]] += 1
        every.update(drawn)
    for counter, number in ((first, steps), (every, steps * micro_batches)):
        share = np.array([counter[p] for p in range(found.largest + 1)]) / number
        assert np.abs(share - found.pmf).max() < 5 * np.sqrt(max(found.pmf) / number)
    assert all(k == min(n + k, 4) for n, k in recurrence().steps(0, micro_batches))


def test_strata_lower_the_variance_of_a_steps_cost():
    def deviation(micro_batches):
        return np.std([np.mean([sum(s) for s in recurrence().steps(p, micro_batches)]) for p in range(400)])

    alone = deviation(1)
    assert deviation(16) < alone / 4 / 2  # independent draws would have a quarter


def test_a_ramp_grows_to_the_mean():
    ramped = recurrence(ramp_steps=8)
    options = [ramped.distribution(place).options for place in range(10)]
    assert [o.backprop_depth for o in options] == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert [o.mean_recurrence for o in options] == [2, 2, 4, 4, 6, 6, 8, 8, 8, 8]
    assert options[-1] == options[7] == DEPTH
    assert ramped.steps(9, 4) == recurrence().steps(9, 4)
    assert max(k for place in range(2) for _, k in ramped.steps(place, 8)) == 1


def test_a_ramp_of_fixed_counts():
    depth = DepthOptions(mean_recurrence=4, backprop_depth=8, sampling="fixed")  # less than backpropagates
    ramped = recurrence(depth=depth, ramp_steps=4)
    assert [ramped.steps(place, 1) for place in range(5)] == [[(0, 1)], [(0, 2)], [(0, 3)], [(0, 4)], [(0, 4)]]


def test_keys_of_rows():
    keys = recurrence().row_keys([0, 1, 2**40, 5])
    assert keys.dtype == torch.int64 and len(set(keys.tolist())) == 4 and int(keys.min()) >= 0
    assert torch.equal(recurrence().row_keys([5]), keys[3:])
    assert not torch.equal(recurrence(seed=1).row_keys([5]), keys[3:])


class Rows:
    """Row i holds i, and costs more or less."""

    def __getitem__(self, i):
        return Row(np.full(4, i), np.full(4, i), np.array([], int))

    def pairs(self, i):
        return i * 7 % 5


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("dp", [2, 4])
def test_a_micro_batch_has_the_same_rows_on_any_number_of_ranks(balance, dp):
    def micro_batches(dp):
        """Of a step on all ranks: its rows, with their keys, and its number of iterations."""
        found = []
        for rank in range(dp):
            loader = PackedLoader(
                Rows(), lambda rows, *_: collate(rows), global_batch_size=16, micro_batch_size=4 // dp, dp_rank=rank,
                dp_size=dp, balance=balance, recurrence=recurrence(),
            )  # fmt: skip
            found.append(loader.step(3))
        merged = []
        for parts in zip(*found):
            assert len({part.num_steps for part in parts}) == 1
            rows = {(int(ids[0]), int(key)) for part in parts for ids, key in zip(part.input_ids, part.row_keys)}
            merged.append((parts[0].num_steps, rows))
        return merged

    alone = micro_batches(1)
    assert micro_batches(dp) == alone
    assert {row for _, rows in alone for row, _ in rows} == set(range(48, 64))
    assert [steps for steps, _ in alone] == recurrence().steps(3, 4)


# what is watched


def batch(num_steps, targets=10):
    made = collate([Row(np.zeros(4, int), np.zeros(4, int), np.array([], int))])
    return replace(made, num_steps=num_steps, num_targets=targets)


def test_losses_go_to_the_third_of_their_depth():
    take_noted()
    low, high = (RecurrenceDistribution(DEPTH).quantile(u) for u in (1 / 3, 2 / 3))
    note = LossByDepth(DEPTH, leads=True)
    for steps, loss in (((0, 1), 30.0), ((low - 4, 4), 50.0), ((low - 3, 4), 20.0), ((high - 3, 4), 10.0)):
        note(batch(steps), torch.tensor([loss, 0.0]))
    LossByDepth(DEPTH, leads=False)(
        batch((0, 1)), torch.tensor([5.0])
    )  # a peer's part of a loss, whose targets count once
    assert take_noted() == {
        "depth_loss_low": [85.0, 20.0], "depth_loss_mid": [20.0, 10.0], "depth_loss_high": [10.0, 10.0]
    }  # fmt: skip
    for depth in (None, replace(DEPTH, sampling="fixed")):
        LossByDepth(depth, leads=True)(batch((4, 4)), torch.tensor([1.0]))
    LossByDepth(DEPTH, leads=True)(batch(None), torch.tensor([1.0]))
    assert take_noted() == {}


def test_signatures_tell_draws_apart():
    drawn = [batch((3, 4)), batch((0, 2))]
    assert signature(drawn) == signature([replace(b, num_targets=1) for b in drawn])
    assert len({signature(drawn), signature(drawn[::-1]), signature(drawn[:1]), signature([batch(None)])}) == 4


def test_the_window_counts_iterations():
    window = metrics.Window()
    assert metrics.depth_metrics(window) == {} and window.mean_iterations is None
    window.add_iterations([(0, 2), (5, 4)])
    window.add_iterations([(1, 4)])
    assert metrics.Window(**json.loads(json.dumps(vars(window)))) == window
    assert window.mean_iterations == (2, 10 / 3)
    assert metrics.depth_metrics(window) == {"depth_mean": pytest.approx(16 / 3), "depth_max": 9}


# recipes

RECIPE = """
[model]
vocab_size = 64
hidden_size = 32
num_hidden_layers = 4
layer_pattern = ["mamba2"]
mamba2.head_dim = 16
[data]
train = "tokens"
[model.depth]
mean_recurrence = 8
prelude_layers = 1
coda_layers = 1
"""


def load(tmp_path, *overrides, text=RECIPE):
    path = tmp_path / "deep.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path), overrides).recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.recurrence.ramp_steps=2000", "must be at most train.steps=1000, or the mean depth is never reached"),
        ("train.state_passing.mode=passing", "cannot be had with [model.depth]"),
        ("train.recurrence.eval_steps=[0]", "must be greater than 0, for example train.recurrence.eval_steps=[1, 8]"),
        ("train.recurrence.ramp=1", "did you mean train.recurrence.ramp_steps?"),
        ("model.depth.men_recurrence=8", "did you mean model.depth.mean_recurrence?"),
        ("model.depth.mean_recurrence=2.5", "must be a whole number, for example model.depth.mean_recurrence=32"),
        ("model.depth.mean_recurrence=1025", "is beyond what a run can have: use 1024 at most"),
        ("model.depth=8", "must be a table of options: write a table [model.depth] with some of prelude_layers, coda"),
        ("model.depth.sampling=poisson", "must be one of 'poisson-lognormal-filling' or 'fixed'"),
        ("model.depth.coda_layers=3", "leave no core"),
    ],
)
def test_impossible_recipes_are_refused(tmp_path, override, message):
    with pytest.raises(RecipeError) as refused:
        load(tmp_path, override)
    (problem,) = refused.value.problems
    assert message in problem


@pytest.mark.parametrize("override", ["train.recurrence.ramp_steps=5", "train.recurrence.eval_steps=[1]"])
def test_fixed_depth_has_no_recurrence(tmp_path, override):
    with pytest.raises(RecipeError, match="belongs to models with recurrent depth: leave it out, or add a table"):
        load(tmp_path, override, text=RECIPE.partition("[model.depth]")[0])


def test_recipes_of_either_depth_can_be_told_apart(tmp_path):
    deep, fixed = load(tmp_path), load(tmp_path, text=RECIPE.partition("[model.depth]")[0])
    assert "model.depth.mean_recurrence: 8 there, unset here" in difference(deep, fixed)
    assert "model.depth.mean_recurrence: unset there, 8 here" in difference(fixed, deep)
    assert difference(deep, load(tmp_path, "model.depth.mean_recurrence=8")) == []
