"""Submitting to SLURM, whose programs are stood in for: chains, refusals, logs that are followed."""

import os
import subprocess

import pytest
from typer.testing import CliRunner

from riverrun.launch import cli, slurm_jobs
from riverrun.train import outcome
from tests.launch.slurm_runs import calls, said


def launch(recipe, run_dir, *arguments):
    words = ["launch", recipe, f"--run-dir={run_dir}", "--slurm", "--gpus-per-node=0", "--nproc=1", *arguments]
    return CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"})


def test_a_job_is_submitted(recipe, bin, run_dir):
    submitted = bin("sbatch", "echo '4242;cluster'")
    bin("squeue")
    outcome.request_stop(run_dir, "stop")
    run_dir.joinpath("stop-request").rename(run_dir.parent / "kept")
    result = launch(recipe, run_dir, "train.steps=7")
    assert result.exit_code == 0 and result.stdout == "4242\n", result.output
    script = run_dir / "slurm" / "train.sbatch"
    assert calls(submitted) == [[os.getcwd(), "--parsable", str(script)]]
    assert "    train.steps=7" in script.read_text().splitlines() and slurm_jobs.submitted(run_dir) == ["4242"]
    assert str(run_dir / "slurm" / "4242.out") in result.stderr
    (run_dir / "slurm" / "given-up").write_text("x")
    (run_dir.parent / "kept").rename(run_dir / "stop-request")
    said(run_dir, "finished")
    assert launch(recipe, run_dir).exit_code == 0
    assert not {"given-up", "stop-request", "outcome.json"} & {path.name for path in run_dir.rglob("*")}


def test_a_chain_is_submitted_with_dependencies(recipe, bin, run_dir):
    submitted = bin("sbatch", f'n=$(grep -c -z parsable "{run_dir.parent}/bin/sbatch.calls"); echo $((100 + n))')
    bin("squeue")
    result = launch(recipe, run_dir, "--chain=3")
    assert result.stdout.split() == ["101", "102", "103"], result.output
    script = str(run_dir / "slurm" / "train.sbatch")
    assert [call[1:] for call in calls(submitted)] == [
        ["--parsable", script, "1"],
        ["--parsable", "--dependency=afterany:101", script, "2"],
        ["--parsable", "--dependency=afterany:102", script, "3"],
    ]
    (run_dir.parent / "bin" / "sbatch.calls").unlink()
    bin("sbatch", f'[ $(grep -c -z parsable "{run_dir.parent}/bin/sbatch.calls") = 1 ] && echo 7 || exit 1')
    result = launch(recipe, run_dir, "--chain=3")
    assert result.exit_code == 2 and "`scancel 7` takes them back" in result.stderr


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("echo no such partition >&2; exit 1", "`sbatch --parsable` failed: no such partition"),
        ("echo hello", "sbatch printed 'hello\\n' instead of a job's number"),
        (None, "run this on a login node"),
    ],
)
def test_a_submission_that_fails_is_explained(recipe, bin, run_dir, monkeypatch, does, message):
    if does is None:
        monkeypatch.setenv("PATH", str(run_dir))
    else:
        bin("sbatch", does)
    result = launch(recipe, run_dir)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and message in result.stderr, result.output
    assert slurm_jobs.submitted(run_dir) == []


def test_a_dry_run_submits_nothing(recipe, bin, run_dir):
    submitted = bin("sbatch", "echo 1")
    result = launch(recipe, run_dir, "--dry-run")
    script = run_dir / "slurm" / "train.sbatch"
    assert result.exit_code == 0 and result.stdout == script.read_text() and not calls(submitted)
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_a_run_folder_has_one_run(recipe, bin, run_dir, tmp_path):
    submitted = bin("sbatch", "echo 50")
    assert launch(recipe, run_dir).exit_code == 0
    bin("squeue", "echo '50|PENDING|Priority'")
    result = launch(recipe, run_dir)
    assert result.exit_code == 2 and "50 (PENDING (Priority))" in result.stderr and len(calls(submitted)) == 1
    bin("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    result = launch(recipe, run_dir)
    assert result.exit_code == 2 and "Unable to contact" in result.stderr and len(calls(submitted)) == 1
    bin("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert launch(recipe, run_dir).exit_code == 0
    result = launch(recipe, run_dir, "model.hidden_size=32")
    assert result.exit_code == 2 and "belongs to a run of another recipe" in result.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    result = launch(recipe, tmp_path / "full")
    assert result.exit_code == 2 and "is not empty and holds no run" in result.stderr


def test_a_layout_that_would_fail_is_refused_before_it_queues(recipe, bin, run_dir):
    submitted = bin("sbatch", "echo 1")
    result = launch(recipe, run_dir, "--nodes=3")
    assert result.exit_code == 2 and "train.global_batch_size=4" in result.stderr
    result = launch(recipe, run_dir, "--nodes=3", "parallel.tp=2")
    assert result.exit_code == 2 and "3 ranks do not divide into parallel.tp=2" in result.stderr
    assert not calls(submitted)


def test_an_array_job_is_alive_while_one_of_its_tasks_is(bin, run_dir):
    (run_dir / "slurm").mkdir()
    (run_dir / "slurm" / "jobs").write_text("7\n8\n")
    asked = bin("squeue", "printf '7|COMPLETED|None\\n7|RUNNING|None\\n8|CANCELLED|None\\n7|RUNNING|None\\n'")
    assert slurm_jobs.states(["7", "8"]) == {"7": "COMPLETED, RUNNING", "8": "CANCELLED"}
    assert "--jobs=7,8" in calls(asked)[0]
    assert slurm_jobs.alive(run_dir) == {"7": "COMPLETED, RUNNING"}


def test_a_log_is_followed_to_the_jobs_end(recipe, bin, run_dir, monkeypatch):
    monkeypatch.setattr(slurm_jobs, "POLL_SECONDS", 0.0)
    log = run_dir / "slurm" / "9.out"
    bin("sbatch", "echo 9")
    # the job writes a line each time that somebody asks for its state
    bin(
        "squeue",
        f'n=$(cat "{log}" 2>/dev/null | wc -l); [ -d "{log.parent}" ] && echo "line $n é" >>"{log}"\n'
        '[ "$n" -lt 3 ] && echo "9|RUNNING|None" || echo "9|COMPLETED|None"',
    )
    result = launch(recipe, run_dir, "--follow")
    assert result.exit_code == 1, "no outcome: it failed"
    assert result.stdout == "9\nline 0 é\nline 1 é\nline 2 é\nline 3 é\n" and "ended: COMPLETED" in result.stderr


def test_a_job_submitted_from_within_a_job_does_not_inherit_its_size(recipe, bin, run_dir, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NNODES", "64")
    monkeypatch.setenv("SLURM_CONF", "/etc/it")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    bin("sbatch", f'env >"{run_dir.parent}/env"; echo 5')
    assert launch(recipe, run_dir).exit_code == 0
    env = (run_dir.parent / "env").read_text()
    assert "SLURM_CONF=/etc/it" in env and "SBATCH_ACCOUNT=mine" in env and "SLURM_NNODES" not in env
