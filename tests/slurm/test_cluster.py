"""Jobs on a real SLURM of several daemons on this host: preempted, cut from power, crashing, at a time limit."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from riverrun.launch import cli, run_folder
from riverrun.train import checkpoint, metrics, outcome
from tests.slurm import cluster, tiny

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())
MEASURED = {"tokens_per_second", "mfu", "memory_gib"}
HOSTILE = "a 'run' `touch stolen`$(touch stolen); \"touch stolen\" 100% é"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[cluster.Cluster]:
    with cluster.Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as started:
        yield started


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def riverrun(slurm, monkeypatch):
    """A command, in this process."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.env[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*words: object) -> str:
        result = CliRunner().invoke(cli.app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


@pytest.fixture
def launch(riverrun, recipe):
    """`riverrun launch --slurm` with one CPU rank a node. Returns the jobs' numbers."""

    def start(run_dir: Path, *arguments: str) -> list[str]:
        slurm = ("--slurm", "--gpus-per-node=0", "--nproc=1", "--partition=main")
        return riverrun("launch", recipe, f"--run-dir={run_dir}", *slurm, *arguments).split()

    return start


@pytest.fixture
def play(launch, tmp_path, monkeypatch):
    """Launches a run whose starts do what is laid down instead of training. Returns its folder and its jobs."""

    def start(plan: list[str], *arguments: str, bad: str = "") -> tuple[Path, list[str]]:
        run_dir, interpreter = tmp_path / "run", tmp_path / "python"
        words = shlex.join([sys.executable, str(Path(__file__).with_name("stand_in.py"))])
        interpreter.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        interpreter.chmod(0o755)
        with monkeypatch.context() as context:
            context.setattr(sys, "executable", str(interpreter))
            launch(run_dir, "--dry-run", *arguments)  # makes the folder that of a run
            (run_dir / "plan").write_text("\n".join(plan))
            (run_dir / "bad").write_text(bad)
            jobs = launch(run_dir, *arguments)
        return run_dir, jobs

    return start


def log(run_dir: Path, job: str) -> str:
    path = run_dir / "slurm" / f"{job}.out"
    return path.read_text(errors="replace") if path.exists() else "(no log)"


def starts(run_dir: Path) -> list[list[str]]:
    """The job and the node of each start that `stand_in.py` has seen."""
    return [line.split() for line in (run_dir / "starts").read_text().splitlines()]


def wait_for(run_dir: Path, job: str, condition, what: str) -> None:
    try:
        cluster.wait_until(condition, what)
    except TimeoutError as error:
        raise AssertionError(f"{error}:\n{log(run_dir, job)}") from None


def ranks_of(slurm: cluster.Cluster, run_dir: Path) -> list[int]:
    """The ranks' processes, without torchrun's and the shells'."""
    found = slurm.tasks("riverrun.launch.cli", f"--run-dir={run_dir}")
    return [pid for pid in found if "torch.distributed.run" not in cluster.read(pid, "cmdline")]


@contextlib.contextmanager
def held(slurm: cluster.Cluster, run_dir: Path, job: str, beyond: int) -> Iterator[list[int]]:
    """Waits for a checkpoint beyond a step, and holds the ranks: what is done to them comes before their last step."""
    wait_for(run_dir, job, lambda: run_folder.newest_step(run_dir) > beyond, f"a checkpoint beyond step {beyond}")
    ranks = ranks_of(slurm, run_dir)
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield ranks
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def assert_same_run(got: Path, want: Path) -> None:
    """Every record, and every weight of the last checkpoint, bit for bit."""

    def records(run_dir: Path) -> list[dict]:
        found = metrics.read(run_dir / "metrics.jsonl")
        return [{k: v for k, v in record.items() if k not in MEASURED} for record in found]

    assert records(got) == records(want)
    assert checkpoint.checkpoints(got)[-1].name == checkpoint.checkpoints(want)[-1].name
    weights, others = checkpoint.load_weights(got), checkpoint.load_weights(want)
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name


def test_a_run_that_is_preempted_crashes_and_loses_a_node_equals_an_uninterrupted_one(
    slurm, launch, riverrun, tmp_path, monkeypatch
):
    monkeypatch.setenv("EXAMPLE_API_KEY", "hush")
    monkeypatch.setenv("EXAMPLE_PROXY", "http://me:hush@example.org")
    monkeypatch.setenv("EXAMPLE_CHOICE", "kept")
    straight, run_dir = tmp_path / "straight", tmp_path / HOSTILE
    (job,) = launch(straight, "--nodes=2", "--no-check")
    assert slurm.wait_for_end(job)["JobState"] == "COMPLETED", log(straight, job)
    (environment,) = straight.glob("slurm/*/env.txt")
    assert "EXAMPLE_CHOICE=kept" in environment.read_text() and "hush" not in environment.read_text()
    assert {path.parts[-5] for path in straight.glob("slurm/*/*/*/attempt_0/0/stderr.log")} == {"n1", "n2"}

    (job,) = launch(run_dir, "--nodes=2", "--no-check")
    with held(slurm, run_dir, job, 0):
        assert f"{job}: RUNNING" in riverrun("status", run_dir)
        slurm.command("scancel", "--signal=USR1", "--batch", job)
        wait_for(run_dir, job, lambda: outcome.stop_request(run_dir) == "requeue", "the request to stop")
    wait_for(run_dir, job, lambda: ": requeued" in log(run_dir, job), "the first requeue")
    saved = run_folder.newest_step(run_dir)

    with held(slurm, run_dir, job, saved) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    wait_for(run_dir, job, lambda: log(run_dir, job).count(": requeued") == 2, "the requeue after a crash")
    saved = run_folder.newest_step(run_dir)

    with held(slurm, run_dir, job, saved):
        assert slurm.job(job)["NodeList"] == "n[1-2]"
        slurm.cut_power("n2")
    ended = slurm.wait_for_end(job)
    slurm.restore_power("n2")
    assert ended["JobState"] == "COMPLETED" and ended["NodeList"] == "n[1,3]", log(run_dir, job)
    assert int(ended["Restarts"]) == 3 and log(run_dir, job).count("[rank 0] tiny:") == 4
    assert_same_run(run_dir, straight)
    assert not list(Path.cwd().glob("stolen")) and not list(tmp_path.rglob("stolen"))


def test_a_crash_without_progress_is_not_repeated(slurm, play):
    run_dir, (job,) = play(["save crash", "crash", "finish"])
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), log(run_dir, job)
    assert "came from step -1 to step 1: requeued" in log(run_dir, job)
    assert "giving up: job" in log(run_dir, job) and len(starts(run_dir)) == 2


def test_crashes_with_progress_are_repeated_only_so_often(slurm, play):
    run_dir, (job,) = play(["save crash"] * 9, "--max-restarts=1")
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), log(run_dir, job)
    assert "was requeued 1 times already" in log(run_dir, job) and len(starts(run_dir)) == 2


def test_a_mistake_is_not_repeated(slurm, play):
    run_dir, (job,) = play(["save mistake", "finish"])
    assert slurm.wait_for_end(job)["JobState"] == "FAILED"
    assert "giving up: this has to be mended" in log(run_dir, job) and len(starts(run_dir)) == 1


def test_ahead_of_the_time_limit_the_run_saves_and_is_requeued(slurm, play):
    run_dir, (job,) = play(["wait", "finish"], "--time=1", "--signal-seconds=59")
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log(run_dir, job)
    assert "the time limit is near" in log(run_dir, job) and run_folder.newest_step(run_dir) == 1


def test_a_bad_node_is_left_out_of_the_next_start(slurm, play):
    run_dir, (job,) = play(["finish"], "--exclude=n3", bad="n1")
    ended = slurm.wait_for_end(job)
    assert ended["JobState"] == "COMPLETED", log(run_dir, job)
    assert starts(run_dir) == [[job, "n2"]] and ended["ExcNodeList"] in ("n[1,3]", "n3,n1", "n1,n3"), ended
    assert (run_dir / "slurm" / "exclude").read_text().split() == ["n1"]


def test_a_chain_goes_on_from_job_to_job_and_ends_with_the_run(slurm, play):
    run_dir, jobs = play(["save crash", "wait", "finish"], "--chain=4")
    wait_for(run_dir, jobs[1], lambda: (run_dir / "starts").exists() and len(starts(run_dir)) == 2, "the second job")
    slurm.command("scancel", "--signal=USR1", "--batch", jobs[1])
    logs = chain_logs(slurm, run_dir, jobs)
    assert "crashed, but came from step -1 to step 1; job 2 of 4 of the chain goes on" in logs[0]
    assert "saved; job 3 of 4 of the chain goes on" in logs[1]


def test_a_chain_may_be_an_array(slurm, play):
    run_dir, (job,) = play(["save crash", "save crash", "finish"], "--chain=4", "--array")
    logs = chain_logs(slurm, run_dir, [f"{job}_{index}" for index in range(1, 5)])
    assert "job 2 of 4 of the chain goes on" in logs[0] and "job 3 of 4 of the chain goes on" in logs[1]


def chain_logs(slurm: cluster.Cluster, run_dir: Path, jobs: list[str]) -> list[str]:
    """Of four jobs of which the third finishes the run."""
    ended = [slurm.wait_for_end(job) for job in jobs]
    logs = [log(run_dir, job["JobId"]) for job in ended]
    assert [job["JobState"] for job in ended] == ["COMPLETED"] * 4, logs
    assert [job for job, _ in starts(run_dir)] == [job["JobId"] for job in ended[:3]]
    assert "the run is finished: nothing to do" in logs[3]
    return logs


def test_a_run_is_stopped_while_it_runs_and_while_it_waits(slurm, play, launch, riverrun):
    run_dir, (job,) = play(["wait", "finish"])
    wait_for(run_dir, job, lambda: (run_dir / "starts").exists(), "the start")
    assert "it saves after its current step and ends" in riverrun("stop", run_dir)
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0") and "stopped as asked" in log(run_dir, job)

    slurm.command("scontrol", "update", "PartitionName=main", "State=DOWN")
    (job,) = launch(run_dir, "--no-check")
    assert f"not running yet: job {job} (PENDING" in riverrun("stop", run_dir)
    slurm.command("scontrol", "update", "PartitionName=main", "State=UP")
    assert slurm.wait_for_end(job)["JobState"] == "COMPLETED"
    assert "was asked to stop: nothing to do" in log(run_dir, job) and len(starts(run_dir)) == 1


def test_a_cancelled_job_stays_cancelled(slurm, play):
    run_dir, (job,) = play(["save wait", "finish"])
    wait_for(run_dir, job, lambda: run_folder.newest_step(run_dir) == 1, "a checkpoint")
    slurm.command("scancel", job)
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
