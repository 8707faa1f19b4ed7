"""Whole runs in processes of their own. Killed, interrupted or out of disk, then resumed, they equal a whole one."""

import gzip
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import training_workers as workers
from training_workers import recipe, run, train_run

from riverrun.train import checkpoint, metrics
from riverrun.train.build import build_model
from riverrun.train.prefetch import Prefetcher

KILLED = -signal.SIGKILL


def train(run_dir, fault="", at=-1, resume="auto", config=None, log=None, **layout):
    """Returns the exit codes' first that is not 0, and what was printed."""
    log = log or run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    codes = run(train_run, config or recipe(), run_dir, resume, fault, at, log=log, **layout)
    return next((code for code in codes if code), 0), workers.read(log)


def records(run_dir):
    """What must not depend on interruptions."""
    measured = {"tokens_per_second", "mfu", "memory_gib"}
    return [{k: v for k, v in r.items() if k not in measured} for r in metrics.read(run_dir / "metrics.jsonl")]


def assert_same_run(got, want):
    """Every tensor and number of the last checkpoint, and every record, bit for bit."""
    assert_same_weights(got, want)
    last = checkpoint.folder_of(want) / "step_00000020"
    assert checkpoint.read_state(checkpoint.folder_of(got) / "step_00000020") == checkpoint.read_state(last)
    assert records(got) == records(want)


def assert_same_weights(got, want):
    """And the optimiser's state, and the random number generators, bit for bit."""
    assert [c.name for c in checkpoint.checkpoints(got)][-1] == "step_00000020"
    last = checkpoint.folder_of(want) / "step_00000020"
    files = sorted(last.rglob("*.pt"))
    assert len(files) >= 3
    for file in files:
        other = checkpoint.folder_of(got) / "step_00000020" / file.relative_to(last)
        assert_equal(torch.load(other, weights_only=False), torch.load(file, weights_only=False), file.name)


def assert_equal(a, b, where):
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}[{i}]")
    elif hasattr(a, "__dict__"):
        assert_equal(vars(a), vars(b), where)
    else:
        assert a == b, where


def test_memories_tell_in_the_steps_that_are_recorded(tmp_path):
    model = {"layer_pattern": ["titans_lmm"], "titans_lmm": {"head_dim": 16, "chunk_size": 4}}
    assert train(tmp_path / "run", config=recipe(model=model, train={"steps": 4, "log_every": 2}))[0] == 0
    found = [record for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert [record["step"] for record in found] == [2, 4]
    assert all(0 < record["memory_alpha"] < 1 and record["memory_loss"] > 0 for record in found)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    code, printed = train(run_dir)
    assert code == 0, printed
    return run_dir


def test_a_run_learns_and_leaves_everything_an_export_needs(straight):
    found = records(straight)
    trained = [r for r in found if r["kind"] == "train"]
    losses = [r["loss"] for r in trained]
    assert [r["step"] for r in trained] == [3, 6, 9, 12, 15, 18, 20]
    assert [r["step"] for r in found if r["kind"] == "held_out"] == [0, 10, 20]
    assert losses[-1] < 0.75 * losses[0]
    assert trained[0]["bits_per_byte"] == pytest.approx(metrics.bits_per_byte(losses[0], 4.0))
    assert trained[0]["tokens"] == 3 * 8 * 16 and trained[0]["lr"] == pytest.approx(1e-2, rel=0.02)
    assert [c.name for c in checkpoint.checkpoints(straight)] == ["step_00000016", "step_00000020"]
    for name in ("config.toml", "config.json", "versions.json", "loss.png"):
        assert (straight / name).stat().st_size > 0

    weights = checkpoint.load_weights(straight)
    model = build_model(recipe())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(w.dtype == torch.float32 for w in weights.values())
    model.load_state_dict(weights, strict=True)
    begin = torch.arange(8)[:, None] * 7
    tokens = (begin + torch.arange(17)) % 64
    out = model(input_ids=tokens[:, :-1], targets=tokens[:, 1:])
    assert out.loss.item() == pytest.approx(losses[-1], abs=0.5), "the weights are the trained ones"


@pytest.mark.parametrize("fault, at", [("kill", 9), ("kill while writing", 8), ("kill before renaming", 12)])
def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path, fault, at):
    run_dir = tmp_path / "run"
    code, _ = train(run_dir, fault, at)
    assert code == KILLED
    saved = [checkpoint.step_of(c) for c in checkpoint.checkpoints(run_dir)]
    assert saved[-1] == {"kill": 8, "kill while writing": 4, "kill before renaming": 8}[fault]
    assert bool(list(checkpoint.folder_of(run_dir).glob("*.partial"))) == (fault != "kill")
    code, printed = train(run_dir)
    assert code == 0 and f"from step {saved[-1]} " in printed, printed
    assert not list(checkpoint.folder_of(run_dir).glob("*.partial"))
    assert_same_run(run_dir, straight)


@pytest.mark.parametrize("fault, code, saves", [("int", 130, True), ("term", 143, True), ("int twice", 130, False)])
def test_a_signal_ends_a_run_after_its_step(straight, tmp_path, fault, code, saves):
    run_dir = tmp_path / "run"
    got, printed = train(run_dir, fault, 9)
    assert got == code, printed
    last = checkpoint.step_of(checkpoint.checkpoints(run_dir)[-1])
    assert (last in (9, 10)) if saves else (last == 8)
    assert ("--resume auto" in printed) == saves
    assert train(run_dir)[0] == 0
    assert_same_run(run_dir, straight)


def test_a_full_disk_does_not_stop_training(straight, tmp_path):
    run_dir = tmp_path / "run"
    code, printed = train(run_dir, "disk full", 8)
    assert code == 0 and "WARNING: the checkpoint of step 8" in printed, printed
    assert_same_run(run_dir, straight)


def test_a_run_whose_last_checkpoint_failed_says_so(tmp_path):
    run_dir, config = tmp_path / "run", recipe(train={"steps": 12, "eval_every": 0})
    code, printed = train(run_dir, "disk full", 12, config=config)
    assert code == 1 and "could not be saved: the last checkpoint is that of step 8" in printed, printed
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(run_dir)] == [4, 8]


def test_a_damaged_checkpoint_is_passed_over(straight, tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, "kill", 10)
    newest = checkpoint.checkpoints(run_dir)[-1]
    victim = next(newest.glob("zero/*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, printed = train(run_dir)
    assert code == 0 and str(victim) in printed and "from step 4 " in printed, printed
    assert_same_run(run_dir, straight)


def test_a_finished_run_can_be_extended_but_not_changed(straight, tmp_path):
    code, printed = train(straight, config=recipe(optimizer={"lr": 2e-2}, train={"seed": 1}))
    assert code != 0 and "optimizer.lr: 0.01 there, 0.02 here" in printed and "train.seed" in printed
    code, printed = train(straight, resume="never")
    assert code != 0 and "is not empty" in printed
    branch = tmp_path / "branch"
    longer = recipe(train={"steps": 22, "log_every": 1})
    code, printed = train(branch, resume=str(checkpoint.folder_of(straight) / "step_00000016"), config=longer)
    assert code == 0 and "from step 16 " in printed, printed
    assert [r["step"] for r in records(branch) if r["kind"] == "train"] == [17, 18, 19, 20, 21, 22]


def test_a_finished_run_started_again_changes_nothing(straight, tmp_path):
    run_dir, config = tmp_path / "run", recipe(train={"steps": 4, "eval_every": 0})
    assert train(run_dir, config=config)[0] == 0
    before = records(run_dir)
    assert [(r["kind"], r["step"]) for r in before] == [("train", 3), ("train", 4), ("held_out", 4)]
    code, printed = train(run_dir, config=config)
    assert code == 0 and "finished 4 steps" in printed
    assert records(run_dir) == before


def test_two_ranks_train_like_one_and_resume_bit_for_bit(straight, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, printed = train(whole, "disk full", 4, world=2)  # which one rank's full disk must not change either
    assert code == 0 and "WARNING: the checkpoint of step 4" in printed, printed
    alone = [r["loss"] for r in records(straight)]
    assert [r["loss"] for r in records(whole)] == pytest.approx(alone, abs=1e-2)
    assert train(broken, "kill", 9, world=2)[0] != 0
    code, printed = train(broken, world=2)
    assert code == 0 and "from step 8 " in printed, printed
    assert_same_run(broken, whole)


def test_batches_are_made_in_order_and_errors_reach_the_loop():
    def make(step):
        if step == 5:
            raise OSError("gone")
        return [step]

    with Prefetcher(make, 2, 4) as batches:
        assert [batches.next(), batches.next()] == [[2], [3]]
    with Prefetcher(make, 4, 9) as batches:
        assert batches.next() == [4]
        with pytest.raises(OSError, match="gone"):
            batches.next()


def test_the_run_folder_describes_its_software(straight):
    assert {"torch", "deepspeed", "transformers", "riverrun"} <= json.loads(
        (straight / "versions.json").read_text()
    ).keys()


def test_a_profile_is_written_once(tmp_path):
    config = recipe(train={"steps": 9, "global_batch_size": 2}).model_copy(update={"profile": True})
    assert train(tmp_path / "run", config=config)[0] == 0
    assert {p.name for p in (tmp_path / "run" / "profile").iterdir()} == {"rank_00000.json.gz", "operators.txt"}
    with gzip.open(tmp_path / "run" / "profile" / "rank_00000.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum(name.startswith("ProfilerStep") for name in names) == 3
    assert "aten::mm" in (tmp_path / "run" / "profile" / "operators.txt").read_text()
