"""`riverrun bench-checkpoint`: both kinds, one rank and two; nothing is left behind."""

import re
import subprocess
import sys

from typer.testing import CliRunner

from riverrun.launch import cli

TINY = [
    "quickstart", "model.vocab_size=256", "model.hidden_size=64", "train.global_batch_size=2",
    "train.micro_batch_size=1", "data.seq_len=64", "engine.device=cpu", "--saves", "1",
]  # fmt: skip


def test_both_kinds_on_two_ranks(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "riverrun.launch.cli", "bench-checkpoint", *TINY, "--dir", str(tmp_path)]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^\| (in its place|beside training) \| ([\d.]+) ", done.stdout, re.M))
    assert rows.keys() == {"in its place", "beside training"} and all(float(seconds) > 0 for seconds in rows.values())
    assert "GB on 2 x CPU" in done.stdout and "of the time that it waits in its place" in done.stdout
    (first,) = re.findall(r"the first one beside training waits ([\d.]+) s", done.stdout)
    assert float(first) > 0
    assert not list(tmp_path.iterdir())


def test_a_run_is_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    result = CliRunner().invoke(cli.app, ["bench-checkpoint", *TINY, "--dir", str(tmp_path)])
    assert result.exit_code == 2 and "name another folder" in " ".join(result.output.split())
