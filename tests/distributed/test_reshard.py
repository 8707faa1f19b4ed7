"""Checkpoints that change their layout: every run here is one process' run, to rounding."""

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
import training_workers as workers
from training_workers import recipe, run, train_run

from riverrun.launch.cli import app
from riverrun.train import checkpoint, metrics
from riverrun.train.shards import Shards, Universal
from riverrun.train.universal import reshard


def config(zero_stage=1, tp=1, cp=1, **train):
    """10 steps in fp32, saved every 2 steps, with an eps that lets rounding stay rounding."""
    return recipe(
        model=MODEL,
        train={"dtype": "fp32", "steps": 10, "log_every": 1, "eval_every": 5, "micro_batch_size": 2, **train},
        checkpoint={"every": 2},
        optimizer={"eps": 1e-3},
        engine={"zero_stage": zero_stage},
        parallel={"tp": tp, "cp": cp},
    )


MODEL = {
    "layer_pattern": ["mamba2", "attention", "gated_delta"],
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
    "gated_delta": {"num_heads": 2, "head_dim": 8, "num_householder": 2, "chunk_size": 8},
}


def train(run_dir, *options, world=1, kill=-1, resume="auto", **kwargs):
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    chosen = config(*options, **kwargs)
    layout = {"world": world, "cp": chosen.parallel.cp, "tp": chosen.parallel.tp}
    codes = run(train_run, chosen, run_dir, resume, "kill" if kill > 0 else "", kill, log=log, **layout)
    printed = workers.read(log)
    assert (codes != [0] * world) == (kill > 0), printed
    return printed


def losses(run_dir):
    return [(r["step"], r["kind"], r["loss"]) for r in metrics.read(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(folder)
    return folder


def assert_same(run_dir, straight):
    got, want = losses(run_dir), losses(straight)
    assert [g[:2] for g in got] == [w[:2] for w in want]
    assert [g[2] for g in got] == pytest.approx([w[2] for w in want], rel=2e-5)
    ours, theirs = checkpoint.load_weights(run_dir), checkpoint.load_weights(straight)
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_goes_from_layout_to_layout(straight, tmp_path):
    folder = tmp_path / "run"
    train(folder, 1, 2, world=2, kill=3)
    assert "from step 2 " in (printed := train(folder, 3, 2, world=4, kill=5)) and "resharded" in printed
    assert "from step 4 " in train(folder, 2, 1, world=1, kill=7)
    assert "from step 6 " in train(folder, 3, 1, 2, world=4, kill=9)
    assert "from step 8 " in train(folder, 1, 2, 2, world=4)
    assert_same(folder, straight)


def test_the_universal_format_is_deepspeeds_and_resumes(straight, tmp_path):
    folder = tmp_path / "run"
    train(folder, 1, 2, world=4, kill=5)
    result = CliRunner().invoke(app, ["reshard", str(folder), "--out", str(tmp_path / "whole")])
    assert result.exit_code == 0, result.output
    whole = Universal(tmp_path / "whole" / "zero")
    newest = checkpoint.find(folder)
    shards = Shards(newest / "zero", checkpoint.plan_of(config(), 2))
    assert set(whole) == set(shards) and whole.counters == shards.counters
    for name in shards:
        assert sorted(whole.keys_of(name)) == sorted(shards.keys_of(name))
        assert whole.numbers_of(name)["step"] == shards.numbers_of(name)["step"]
        for key in shards.keys_of(name):
            assert torch.equal(whole.read(name, key), shards.read(name, key)), (name, key)
    again = tmp_path / "again"
    assert "resharded" in train(again, 2, 1, world=2, resume=str(tmp_path / "whole"))
    got = [loss for step, kind, loss in losses(again) if kind == "train"]
    want = [loss for step, kind, loss in losses(straight) if kind == "train" and step > 4]
    assert got == pytest.approx(want, rel=2e-5)


def test_stage_three_is_put_together_alike(tmp_path):
    folder = tmp_path / "run"
    train(folder, 3, 2, world=4, kill=3)
    reshard(folder, tmp_path / "whole", 2)
    whole, shards = Universal(tmp_path / "whole" / "zero"), Shards(
        checkpoint.find(folder) / "zero", checkpoint.plan_of(config(), 2)
    )  # fmt: skip
    assert set(whole) == set(shards)
    assert all(torch.equal(whole[name], shards[name]) for name in shards)


def test_what_cannot_be_resharded(straight, tmp_path):
    out = CliRunner().invoke(app, ["reshard", str(tmp_path / "no"), "--out", str(tmp_path / "x")])
    assert out.exit_code != 0
    with pytest.raises(ValueError, match="no checkpoint of step 5"):
        reshard(straight, tmp_path / "x", 5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        reshard(straight, tmp_path / "full")
