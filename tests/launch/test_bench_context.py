"""`riverrun bench-context`: shared rows timed beside whole ones."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from riverrun.launch import cli

TINY = ["--width", "64", "--dtype", "fp32", "--device", "cpu", "--repeats", "1"]


def test_every_length_has_its_row(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "riverrun.launch.cli", "bench-context", "para_gru", "--lengths", "32,64", *TINY]
    done = subprocess.run([*torchrun, *command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("speed-up") == 1 and "| 64 " in done.stdout
    record = json.loads((tmp_path / "context.json").read_text())
    assert [row["length"] for row in record["rows"]] == [32, 64] and record["ranks"] == 2
    for row in record["rows"]:
        assert row["alone"] > 0 and row["shared"] > 0 and row["deviation"] < 1e-5
    assert (tmp_path / "context.md").read_text().strip() in done.stdout and (tmp_path / "context.png").stat().st_size


@pytest.mark.parametrize(
    ("world", "arguments", "message"),
    [
        (1, ["para_gru"], "one rank has nobody to share with: torchrun --nproc-per-node 2"),
        (2, ["parrot"], "there is no mixer 'parrot'; choose one of"),
        (2, ["para_gru", "--lengths", "64,33"], "--lengths 33 does not divide among 2 ranks"),
    ],
)
def test_what_cannot_be_measured(world, arguments, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    result = CliRunner().invoke(cli.app, ["bench-context", *arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
