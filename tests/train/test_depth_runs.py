"""Whole runs of recurrent-depth models: they learn, tell of their recurrence, and resume bit for bit."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from training_workers import recipe

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.parallel.sharding import meta_model
from riverrun.train import checkpoint, metrics
from riverrun.train.recurrence import Recurrence
from tests.train.test_loop import KILLED, assert_same_run, records, train

DEPTH = {"prelude_layers": 1, "coda_layers": 0, "mean_recurrence": 4, "backprop_depth": 2}


def deep(**sections):
    """Attention, then a core of Mamba-2 that runs several times."""
    model = {"depth": DEPTH, "layer_pattern": ["attention", "mamba2"]}
    train = {"recurrence": {"ramp_steps": 6, "eval_steps": [1, 4, 8]}} | sections.pop("train", {})
    return recipe(model=model, train=train, log={"peak_tflops": 1.0}, **sections)  # a peak, so that MFU is told


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    code, printed = train(run_dir, config=deep())
    assert code == 0, printed
    return run_dir


def test_a_run_learns_and_tells_of_its_recurrence(straight):
    found = records(straight)
    trained = [r for r in found if r["kind"] == "train"]
    assert trained[-1]["loss"] < 0.75 * trained[0]["loss"]
    recurrence, done = Recurrence(deep().model.depth, deep().train.recurrence, 0), 0
    for record in trained:
        drawn = [sum(s) for place in range(done, record["step"]) for s in recurrence.steps(place, 4)]
        assert record["depth_mean"] == pytest.approx(sum(drawn) / len(drawn)) and record["depth_max"] == max(drawn)
        assert 0 < record["depth_change"] < 2 and record["depth_norm"] > 0
        assert -0.1 < record["depth_correlation"] <= 1
        done = record["step"]
    assert trained[0]["depth_mean"] < 3 < trained[-1]["depth_mean"], "of the ramp"


def test_the_loss_by_depth_is_that_of_all_micro_batches(straight):
    """Each third has the losses of some; together they are the objective's."""
    record = [r for r in records(straight) if r["kind"] == "train"][-1]
    thirds = [record[name] for name in record if name.startswith("depth_loss_")]
    assert len(thirds) == 3 and min(thirds) <= record["loss"] <= max(thirds)


def test_evaluations_at_several_depths(straight):
    held_out = [r for r in records(straight) if r["kind"] == "held_out"]
    assert [r["step"] for r in held_out] == [0, 10, 20]
    for record in held_out:
        assert record["loss_r4"] == record["loss"] and record["perplexity_r4"] == record["perplexity"]
        assert len({record[f"loss_r{r}"] for r in (1, 4, 8)}) == 3
    assert held_out[-1]["loss_r4"] < held_out[-1]["loss_r1"], "more iterations than one must be of use"


def test_mfu_counts_the_iterations_that_were_done(straight):
    whole = meta_model(RiverrunConfig.from_options(deep().model))
    last = [r for r in metrics.read(straight / "metrics.jsonl") if r["kind"] == "train"][-1]
    steps = Recurrence(deep().model.depth, deep().train.recurrence, 0)
    drawn = [s for place in (18, 19) for s in steps.steps(place, 4)]
    n, k = (sum(part) / len(drawn) for part in zip(*drawn))
    flops = whole.training_flops_per_token(16, (n, k))
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * flops / 1e12)
    assert flops != pytest.approx(whole.training_flops_per_token(16), rel=0.01)


def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path):
    run_dir = tmp_path / "run"
    assert train(run_dir, "kill", 9, config=deep())[0] == KILLED
    code, printed = train(run_dir, config=deep())
    assert code == 0 and "from step 8 " in printed, printed
    assert_same_run(run_dir, straight)


def test_after_a_rollback_steps_go_as_deep_as_without_the_bad_data(tmp_path):
    """The number of iterations belongs to the data's place, not to the step."""
    clean, bad = tmp_path / "clean", tmp_path / "bad"
    config = deep(guard={"window": 8, "patience": 3}, train={"eval_every": 0, "log_every": 1})
    assert train(clean, "hole", 9, config=config)[0] == 0
    code, printed = train(bad, "bad data", 9, config=config)
    assert code == 0 and "back to step 8" in printed, printed
    kept = [(r["step"], r["loss"], r["depth_mean"]) for r in records(clean) if r["kind"] == "train"]
    assert [(r["step"], r["loss"], r["depth_mean"]) for r in records(bad) if r["kind"] == "train"] == kept


def test_ranks_that_draw_unlike_are_told(tmp_path):
    code, printed = train(tmp_path / "run", "other depths", 3, config=deep(), world=2)
    assert code != 0 and "step 4 drew unlike numbers of iterations" in printed, printed
    assert not checkpoint.checkpoints(tmp_path / "run"), "nothing is saved of it"


def test_other_depths_of_evaluation_are_no_other_run(straight, tmp_path):
    config = deep(train={"recurrence": {"ramp_steps": 6, "eval_steps": [2]}, "steps": 21})
    source = str(checkpoint.folder_of(straight) / "step_00000020")
    code, printed = train(tmp_path / "run", resume=source, config=config)
    assert code == 0, printed
    assert "loss_r2" in records(tmp_path / "run")[-1]
    code, printed = train(tmp_path / "other", resume=source, config=deep(train={"recurrence": {"ramp_steps": 0}}))
    assert code != 0 and "train.recurrence.ramp_steps: 6 there, 0 here" in printed
