"""The guard's judgement, and whole runs that meet bad data."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from training_workers import recipe

from riverrun.train import checkpoint, outcome
from riverrun.train.config import GuardConfig
from riverrun.train.data.gaps import place_of, with_gap
from riverrun.train.guard import Guard
from tests.train.test_loop import assert_same_weights, train


def seasoned(**config):
    """A guard that has seen losses and norms of mean 2 and 1 and deviations of 0.1 and 0.05."""
    guard = Guard(GuardConfig(window=16, **config))
    for step in range(16):
        guard.observe(2 + 0.1 * (-1) ** step, 1 + 0.05 * (-1) ** step, False)
    return guard


def test_outliers_are_refused_and_what_is_usual_is_not():
    guard = seasoned()
    assert guard.judge(2.59, 1.29) is None and guard.judge(0.1, 0.01) is None
    assert str(guard.judge(2.61, 1.0)) == "the loss of 2.61 is above 2.6"
    assert str(guard.judge(2.0, 1.31)) == "the gradient norm of 1.31 is above 1.3"
    assert seasoned(sigma=3).judge(2.31, 1.0) is not None
    assert seasoned(sigma=0).judge(1e9, 1e9) is None
    assert guard.judge(None, 1.0) is None, "a step without predictions has no loss"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(value):
    guard = Guard(GuardConfig(sigma=0))
    assert str(guard.judge(value, 1.0)) == "the loss is not finite"
    assert str(guard.judge(1.0, value)) == "the gradient norm is not finite"


def test_a_few_steps_are_no_statistics():
    guard = Guard(GuardConfig(window=16))
    for _ in range(7):
        guard.observe(1.0, 1.0, False)
    assert guard.judge(100.0, 100.0) is None
    guard.observe(1.0, 1.0, False)
    assert guard.judge(1.1, 1.0) is not None and guard.judge(1.02, 1.02) is None, "a plateau's noise is no outlier"


def test_steps_refused_for_their_loss_are_counted_and_leave_no_trace_in_the_window():
    guard = seasoned(patience=3)
    limit = guard.judge(99.0, 1.0).limit
    for _ in range(2):
        guard.observe(99.0, 9.0, True)
    assert guard.judge(99.0, 1.0).limit == limit and not guard.gives_up
    again = Guard(guard.config)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state() and again.judge(99.0, 1.0).limit == limit
    again.observe(math.nan, math.nan, True)
    assert again.gives_up and again.skipped == 3 and again.broken and not guard.broken
    again.observe(2.0, 1.0, False)
    assert not again.gives_up and again.skipped == 3 and not again.broken


def test_a_steep_place_is_left_again():
    """Weights that stand still have large gradients as long as they do: refusing these for ever would end the run."""
    guard = Guard(GuardConfig())
    for step in range(128):
        guard.observe(1.4, 0.2 + 0.05 * (-1) ** step, False)
    refused = 0
    while guard.judge(1.4, 3.0) is not None:
        guard.observe(1.4, 3.0, True)
        refused += 1
    assert refused == 4 and not guard.gives_up
    guard.observe(1.4, math.inf, True)
    assert str(guard.judge(1.4, math.inf)) == "the gradient norm is not finite"
    assert guard.judge(1.4, 3.0) is None, "what is not finite is no statistic"
    limit = guard.judge(9.0, 3.0).limit
    guard.observe(9.0, 1e6, True)
    assert guard.judge(9.0, 1.0).limit == limit and guard.judge(1.4, 10.0) is not None, "bad data's norms are none"


def test_a_checkpoint_from_before_there_were_statistics_is_taken_up():
    guard = seasoned()
    guard.restore({"skipped": 3, "in_a_row": 1})
    assert guard.skipped == 3 and guard.rollbacks == 0 and guard.judge(99.0, 99.0) is None


def test_places_go_round_gaps():
    gaps = with_gap(with_gap([], 5, 7), 9, 10)
    assert [place_of(step, gaps) for step in range(9)] == [0, 1, 2, 3, 4, 7, 8, 10, 11]
    assert with_gap([(5, 7)], 7, 9) == [(5, 9)] and with_gap([(5, 9)], 6, 7) == [(5, 9)]
    assert with_gap([(5, 7)], 1, 2) == [(1, 2), (5, 7)]


def events(run_dir, kind):
    found = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


@pytest.mark.parametrize("fault", ["nan", "spike"])
def test_one_bad_batch_costs_one_step(tmp_path, fault):
    code, printed = train(tmp_path / "run", fault, 12)
    assert code == 0 and "step 13 skipped: the loss" in printed, printed
    skips = events(tmp_path / "run", "skip")
    assert [event["step"] for event in skips] == [13]
    assert ("not finite" in skips[0]["reason"]) == (fault == "nan")
    assert checkpoint.read_state(checkpoint.checkpoints(tmp_path / "run")[-1])["guard"]["skipped"] == 1


@pytest.mark.parametrize(
    "layout, stage, asynchronous",
    [({}, 1, False), ({}, 1, True), ({"world": 2}, 1, False), ({"world": 2}, 2, True), ({"world": 2}, 3, False)],
)
def test_a_run_of_bad_steps_is_rolled_back_and_its_data_left_out(tmp_path, layout, stage, asynchronous):
    """It ends as a run that never had the data, bit for bit; also if it is killed after it went back."""
    config = recipe(
        guard={"patience": 3}, engine={"zero_stage": stage}, checkpoint={"asynchronous": asynchronous, "every": 4}
    )
    clean, bad = tmp_path / "clean", tmp_path / "bad"
    assert train(clean, "hole", 9, config=config, **layout)[0] == 0
    code, printed = train(bad, "bad data", 9, config=config, **layout)
    assert code == 0, printed
    assert "steps 10 to 12 were skipped" in printed
    (rollback,) = events(bad, "rollback")
    # the evaluation of step 10 may have come before the checkpoint of step 8 was written to its end
    assert rollback["step"] in ((4, 8) if asynchronous else (8,)) and rollback["gaps"] == [[9, 12]]
    assert_same_weights(bad, clean)
    state = checkpoint.read_state(checkpoint.checkpoints(bad)[-1])
    assert state["gaps"] == [[9, 12]] and state["guard"]["rollbacks"] == 1 and state["guard"]["skipped"] == 0


def test_a_run_that_was_rolled_back_and_killed_goes_on_round_the_gap(tmp_path):
    config = recipe(guard={"patience": 3})
    clean, bad = tmp_path / "clean", tmp_path / "bad"
    assert train(clean, "hole", 9, config=config)[0] == 0
    assert train(bad, "bad data, then kill", 9, config=config)[0] != 0
    assert checkpoint.read_state(checkpoint.checkpoints(bad)[-1])["gaps"] == [[9, 12]]
    assert train(bad, config=config)[0] == 0
    assert_same_weights(bad, clean)


def test_a_run_that_goes_wrong_again_and_again_ends_with_advice(tmp_path):
    config = recipe(guard={"patience": 2, "rollbacks": 2})
    code, printed = train(tmp_path / "run", "bad data for ever", 9, config=config)
    assert code != 0
    assert "guard.rollbacks=2 are used up" in printed and "Lower optimizer.lr" in printed
    standing = outcome.read(tmp_path / "run")
    assert (standing.state, standing.exit_code) == ("failed", outcome.USER_ERROR) and "used up" in standing.message
    assert "the last checkpoint is that of step 8" in printed
    assert len(events(tmp_path / "run", "rollback")) == 2


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    config = recipe(guard={"patience": 2}, checkpoint={"every": 0})
    code, printed = train(tmp_path / "run", "bad data for ever", 3, config=config)
    assert code != 0 and "there is no checkpoint to go back to" in printed


def test_without_a_checkpoint_high_losses_are_lived_with(tmp_path):
    config = recipe(guard={"patience": 2, "window": 8}, checkpoint={"every": 0})
    code, printed = train(tmp_path / "run", "high losses for ever", 8, config=config)
    assert code == 0, printed
    assert [event["step"] for event in events(tmp_path / "run", "skip")] == [9, 10]
    (warning,) = events(tmp_path / "run", "guard")
    assert warning["step"] == 10 and "training goes on" in printed
