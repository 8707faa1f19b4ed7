"""Training on this host through `riverrun launch`: exit codes, restarts, signals; `riverrun status` and `stop`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from riverrun.launch import cli, local, run_folder
from riverrun.launch.commands import status
from riverrun.train import metrics, outcome
from tests.launch.slurm_runs import checkpoints, said

ROOT = Path(__file__).parents[2]


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    return tmp_path / "run"


# starting and starting again


def play(run_dir, *starts, restarts=0):
    """`local.run` on a process that does at each start what is laid down. Returns the code and what was said."""
    code = f"""
import os, signal, subprocess, sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path; from riverrun.train import outcome
from tests.launch.slurm_runs import checkpoints, said
run_dir = Path({str(run_dir)!r})

def wait():
    end = time.monotonic() + 60
    while outcome.stop_request(run_dir) is None and time.monotonic() < end: time.sleep(0.02)

log = run_dir / "starts"
done = len(log.read_text()) if log.exists() else 0
log.write_text("x" * (done + 1))
exec({list(starts)!r}[done])
"""
    messages: list[str] = []
    result = local.run([sys.executable, "-c", code], run_dir, restarts, messages.append)
    return result, "\n".join(messages), len((run_dir / "starts").read_text())


@pytest.mark.parametrize(
    ("does", "code"),
    [
        ("said(run_dir, 'finished', 0)", 0),
        ("said(run_dir, 'stopped', 85)", 85),
        ("said(run_dir, 'failed', 87); sys.exit(1)", 87),
        ("said(run_dir, 'failed', 2); sys.exit(1)", 2),
        ("said(run_dir, 'running', 1); sys.exit(3)", 3),  # it was killed before it could write more
        ("sys.exit(4)", 4),
        ("pass", 1),  # it did not train
        ("os.kill(os.getpid(), signal.SIGKILL)", 1),
    ],
)
def test_the_exit_code_is_that_of_this_start(run_dir, does, code):
    said(run_dir, "finished", 0, "of an earlier start")
    assert play(run_dir, does) == (code, "", 1)


def test_crashes_are_repeated_while_the_run_gets_on(run_dir):
    crash = "checkpoints(run_dir, {}); sys.exit(1)".format
    code, text, starts = play(run_dir, crash(1), crash(2), crash(3), "said(run_dir, 'finished')", restarts=9)
    assert (code, starts) == (0, 4) and "newest checkpoint: step 3. Starting again (7 of --restarts 9 left)" in text


def test_a_crash_without_progress_is_repeated_once(run_dir):
    code, text, starts = play(run_dir, "checkpoints(run_dir, 1); sys.exit(1)", *["sys.exit(5)"] * 9, restarts=9)
    assert (code, starts) == (5, 3) and "as before the last 2 starts. Not started again" in text


def test_restarts_are_bounded(run_dir):
    starts = [f"checkpoints(run_dir, {step}); sys.exit(6)" for step in range(1, 9)]
    code, text, number = play(run_dir, *starts, restarts=2)
    assert (code, number) == (6, 3) and "as --restarts 2 are used up" in text


@pytest.mark.parametrize("does", ["said(run_dir, 'failed', 2); sys.exit(1)", "said(run_dir, 'stopped', 85)"])
def test_mistakes_and_stops_are_no_crashes(run_dir, does):
    assert play(run_dir, "checkpoints(run_dir, 1); " + does, restarts=9)[2] == 1


def test_an_old_request_to_stop_is_withdrawn(run_dir):
    outcome.request_stop(run_dir, "stop")
    code, *_ = play(run_dir, "assert outcome.stop_request(run_dir) is None; said(run_dir, 'finished')")
    assert code == 0


@pytest.mark.parametrize(
    ("name", "asked"), [("SIGUSR1", "requeue"), ("SIGTERM", "stop"), ("SIGINT", "stop"), ("SIGHUP", "stop")]
)
def test_signals_ask_the_run_to_save(run_dir, name, asked):
    does = f"os.kill(os.getppid(), signal.{name}); wait(); said(run_dir, 'stopped', 85, outcome.stop_request(run_dir))"
    before = signal.getsignal(getattr(signal, name))
    code, text, _ = play(run_dir, does, "sys.exit(1)", restarts=3)
    assert code == 85 and outcome.read(run_dir).message == asked and text.startswith(f"{name}: the run saves after")
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_crash_after_a_request_to_stop_is_the_end(run_dir):
    does = "os.kill(os.getppid(), signal.SIGTERM); wait(); checkpoints(run_dir, 1); sys.exit(7)"
    assert play(run_dir, does, "sys.exit(1)", restarts=3)[::2] == (7, 1)


def test_a_second_interrupt_kills_even_ranks_in_sessions_of_their_own(run_dir):
    does = """
rank = subprocess.Popen(["sleep", "300"], start_new_session=True)
(run_dir / "rank").write_text(str(rank.pid))
os.kill(os.getppid(), signal.SIGINT); wait(); os.kill(os.getppid(), signal.SIGINT); time.sleep(300)
"""
    code, text, _ = play(run_dir, does, restarts=3)
    assert code == 1 and "killed; what was saved is intact" in text
    rank = Path("/proc") / (run_dir / "rank").read_text() / "stat"
    until(lambda: not rank.exists() or rank.read_text().rpartition(")")[2].split()[0] == "Z", "the rank's end")


def until(condition, what, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"gave up waiting for {what}"
        time.sleep(0.02)


def test_two_ranks_are_preempted_and_go_on(recipe, tmp_path, monkeypatch):
    """The real thing: torchrun, two gloo ranks, a signal to the launcher."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_dir = tmp_path / "a run; touch stolen"
    seen: list[str] = []

    def preempt():
        until(lambda: run_folder.last_record(run_dir).get("step", 0) >= 2, "a step")
        seen.append(invoke("status", run_dir).stdout)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=preempt)
    thread.start()
    first = invoke("launch", recipe, "train.steps=4000", "--run-dir", run_dir, "--nproc", 2)
    thread.join()
    assert first.exit_code == 85 and "SIGUSR1: the run saves" in first.stderr, first.output
    assert "state       running" in seen[0] and f"on {socket.gethostname()}" in seen[0]
    standing = outcome.read(run_dir)
    assert (standing.state, standing.saved_step) == ("stopped", standing.step) and 2 <= standing.step < 4000
    steps = standing.step + 3
    second = invoke("launch", recipe, f"train.steps={steps}", "--run-dir", run_dir, "--nproc", 2)
    assert second.exit_code == 0, second.output
    done = [r["step"] for r in metrics.read(run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert done == list(range(1, steps + 1)) and not list(Path.cwd().glob("stolen"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say --nproc N"),
        (["--nproc", 1, "--partition", "x", "--nodes", 2], "--nodes, --partition: for SLURM only"),
        (["--nproc", 1, "--gpus-per-node", 0], "--gpus-per-node: for SLURM only"),
        (["--slurm", "--nproc", 1, "--restarts", 1], "--restarts is for this host"),
        (["--slurm", "--nproc", 1, "--chain", 2, "--array", "--follow"], "leave out --array"),
        (["--slurm", "--nproc", 1, "--account", "a\nb"], "cannot be printed"),
        (["--nproc", 3], "train.global_batch_size=4"),
        (["--nproc", 1, "train.stpes=3"], "did you mean train.steps?"),
    ],
)
def test_what_cannot_start_is_refused(recipe, tmp_path, options, message):
    result = invoke("launch", recipe, "--run-dir", tmp_path / "run", *options)
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "run").exists(), result.output


def test_a_folder_in_use_on_this_host_is_refused(recipe, run_dir):
    said(run_dir, "running")  # by this very process
    result = invoke("launch", recipe, "--run-dir", run_dir, "--nproc", 1)
    assert result.exit_code == 2 and f"in use by process {os.getpid()} of this host" in result.stderr


# status


def record(run_dir, step, loss, kind="train"):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "step": step, "loss": loss, "tokens_per_second": 1234.5}) + "\n")


def beat(run_dir, rank, step, age, now, **more):
    (run_dir / "heartbeats").mkdir(exist_ok=True)
    values = {"rank": rank, "host": f"h{rank}", "pid": 1, "step": step, "phase": "forward", "time": now - age}
    (run_dir / "heartbeats" / f"rank_{rank:05d}.json").write_text(json.dumps(values | more))


def test_status_tells_how_a_run_stands(run_dir):
    now = time.time()
    assert invoke("status", run_dir).stdout.split()[:6] == ["state", "not", "started", "step", "0", "checkpoint"]
    said(run_dir, "running", step=0)
    checkpoints(run_dir, 900, 1000)
    record(run_dir, 1234, 2.5)
    record(run_dir, 1234, 9.9, kind="held_out")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99')  # still being written
    beat(run_dir, 0, 1235, 1, now)
    beat(run_dir, 1, 1233, 600, now)
    (run_dir / "heartbeats" / "rank_00002.json").write_text("{")
    outcome.request_stop(run_dir, "requeue")
    lines = [line.split(maxsplit=1) for line in invoke("status", run_dir).stdout.splitlines()]
    found = dict(lines)
    assert found["state"] == "running, asked to requeue" and found["step"] == "1,234 of 9"
    assert found["loss"].startswith("2.5000, written ") and found["tokens/s"] in ("1,234", "1,235")
    assert found["checkpoint"] == "step 1,000"
    assert "2, at steps 1,233 to 1,235; silent: 1 on h1 (forward, " in found["ranks"]

    found = json.loads(invoke("status", run_dir, "--json").stdout)
    assert found["state"] == "running" and found["checkpoint_step"] == 1000 and len(found["heartbeats"]) == 2
    assert found["heartbeats"][1]["age"] == pytest.approx(600 + time.time() - now, abs=5) and found["exit_code"] is None
    said(run_dir, "failed", 87, "rank 3 hung")
    found = json.loads(invoke("status", run_dir, "--json").stdout)
    assert (found["state"], found["exit_code"], found["message"]) == ("failed", 87, "rank 3 hung")


def test_a_run_that_was_killed_is_dead(run_dir):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    standing = outcome.Standing("running", 3, 9)
    outcome.write(run_dir, standing)
    written = json.loads((run_dir / "outcome.json").read_text())
    (run_dir / "outcome.json").write_text(json.dumps(written | {"pid": child.pid}))
    text = invoke("status", run_dir).stdout
    assert text.startswith("state       dead\n") and f"process {child.pid} on {socket.gethostname()} is gone" in text
    assert "is gone" in invoke("stop", run_dir).stdout and outcome.stop_request(run_dir) is None
    # on another host, nobody here can tell
    (run_dir / "outcome.json").write_text(json.dumps(written | {"pid": child.pid, "host": "elsewhere"}))
    assert invoke("status", run_dir).stdout.startswith("state       running\n")


def test_a_run_whose_jobs_have_left_the_queue_is_dead(run_dir, monkeypatch):
    (run_dir / "slurm").mkdir()
    (run_dir / "slurm" / "jobs").write_text("41\n42\n")
    said(run_dir, "running")
    states = {"42": "TIMEOUT"}
    monkeypatch.setattr(status.slurm_jobs, "states", lambda jobs: states)
    found = status.survey(run_dir, time.time())
    assert found["state"] == "dead" and found["jobs"] == {"42": "TIMEOUT"}
    states["42"] = "PENDING (Priority)"
    assert status.survey(run_dir, time.time())["state"] == "running"
    monkeypatch.setattr(status.slurm_jobs, "states", lambda jobs: None)
    found = status.survey(run_dir, time.time())
    assert (found["state"], found["jobs"]) == ("running", {"42": "no SLURM on this host"})


@pytest.mark.parametrize("command", ["status", "stop"])
def test_what_is_no_run_is_refused(tmp_path, command):
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = invoke(command, folder)
        assert result.exit_code == 2 and "--run-dir" in result.stderr, result.output
    assert not list(tmp_path.iterdir())


# stop


def test_a_run_is_asked_to_stop(run_dir):
    said(run_dir, "running")
    result = invoke("stop", run_dir, "--requeue")
    assert result.exit_code == 0 and "is started again" in result.stdout and outcome.stop_request(run_dir) == "requeue"
    result = invoke("stop", run_dir)
    assert f"`riverrun launch` with --run-dir {run_dir} goes on" in result.stdout
    result = invoke("stop", run_dir, "--requeue")
    assert "which --requeue does not overrule" in result.stdout and outcome.stop_request(run_dir) == "stop"


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("stopped", 85), ("failed", 1)])
def test_stop_waits_for_the_end(run_dir, state, code):
    said(run_dir, "running")

    def end():
        until(lambda: outcome.stop_request(run_dir) == "stop", "the request")
        said(run_dir, state, code, "this is how it ended")

    thread = threading.Thread(target=end)
    thread.start()
    result = invoke("stop", run_dir, "--wait")
    thread.join()
    assert result.exit_code == code and result.stdout.endswith("this is how it ended\n")


def test_there_is_nothing_to_stop_in_a_run_that_has_ended(run_dir):
    said(run_dir, "finished", step=9)
    result = invoke("stop", run_dir, "--wait")
    assert result.exit_code == 0 and "nothing to stop: the run is finished, at step 9 of 9" in result.stdout
    assert outcome.stop_request(run_dir) is None


def test_waiting_for_a_run_that_dies_ends(run_dir):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    said(run_dir, "running")
    written = json.loads((run_dir / "outcome.json").read_text())
    (run_dir / "outcome.json").write_text(json.dumps(written | {"pid": child.pid}))

    def end():
        until(lambda: outcome.stop_request(run_dir) == "stop", "the request")
        child.kill()
        child.wait()

    thread = threading.Thread(target=end)
    thread.start()
    result = invoke("stop", run_dir, "--wait")
    thread.join()
    assert result.exit_code == 2 and "gone without a word" in result.stderr
