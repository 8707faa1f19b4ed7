"""Runs that are asked to stop, share a folder, or lose their disk; and what they leave behind."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import training_workers as workers
from training_workers import recipe, train_run

from riverrun.train import checkpoint, lock, outcome
from riverrun.train.outcome import Standing
from tests.train.test_loop import assert_same_weights, records, straight, train  # noqa: F401 - a fixture


def wait_for(condition, process=None):
    for _ in range(6000):
        if value := condition():
            return value
        assert process is None or process.is_alive(), "it ended before"
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("reason", outcome.REASONS)
def test_a_request_ends_a_run_that_is_saved(straight, tmp_path, reason, world):  # noqa: F811
    run_dir = tmp_path / "run"
    code, printed = train(run_dir, f"ask {reason}", 9, world=world)
    assert code == outcome.STOPPED, printed
    standing = outcome.read(run_dir)
    assert (standing.state, standing.exit_code, standing.steps) == ("stopped", outcome.STOPPED, 20)
    assert standing.step == standing.saved_step == checkpoint.step_of(checkpoint.checkpoints(run_dir)[-1])
    assert 9 <= standing.step <= 11 and standing.host == socket.gethostname()
    assert train(run_dir, world=world)[0] == outcome.STOPPED, "the request stands until it is taken back"
    outcome.withdraw(run_dir)
    code, printed = train(run_dir, world=world)
    assert code == 0 and outcome.read(run_dir).state == "finished", printed
    if world == 1:
        assert_same_weights(run_dir, straight)


def test_sigusr1_asks_for_a_new_start(straight, tmp_path):  # noqa: F811
    run_dir = tmp_path / "run"
    code, printed = train(run_dir, "usr1", 9)
    assert code == outcome.STOPPED and "to be started again" in printed
    assert outcome.stop_request(run_dir) == "requeue"
    outcome.withdraw(run_dir)
    assert train(run_dir)[0] == 0
    assert_same_weights(run_dir, straight)


def test_a_stop_is_not_overruled(tmp_path):
    assert outcome.stop_request(tmp_path) is None
    outcome.request_stop(tmp_path, "requeue")
    assert outcome.stop_request(tmp_path) == "requeue"
    outcome.request_stop(tmp_path, "stop")
    outcome.request_stop(tmp_path, "requeue")
    assert outcome.stop_request(tmp_path) == "stop" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "stop-request").write_text("")
    assert outcome.stop_request(tmp_path) == "stop", "touch is enough"
    with pytest.raises(OSError):
        outcome.request_stop(tmp_path / "nowhere", "stop")


def test_a_standing_survives_the_file_and_a_torn_file_is_none(tmp_path):
    outcome.write(tmp_path, Standing("running", 3, 20, 2, job="17"))
    read = outcome.read(tmp_path)
    assert (read.step, read.job, read.pid) == (3, "17", os.getpid())
    text = (tmp_path / "outcome.json").read_text()
    for wrong in (text[:-9], "[]", "{}", '{"state": 1, "surprise": 2}'):
        (tmp_path / "outcome.json").write_text(wrong)
        assert outcome.read(tmp_path) is None


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(tmp_path):
    run_dir = tmp_path / "run"
    log = tmp_path / "first.log"
    first, *_ = workers.start(train_run, recipe(), run_dir, "auto", "wait", 5, log=log)
    try:
        wait_for((run_dir / "waiting").exists, first)
        code, printed = train(run_dir)
        assert code != 0 and f"is in use by process {first.pid} on {socket.gethostname()}" in printed, printed
        assert "riverrun stop" in printed
    finally:
        first.kill()
        first.join()
    assert train(run_dir)[0] == 0, "a dead one holds nothing"


def test_a_run_on_another_host_is_believed_if_its_heart_beats(tmp_path, monkeypatch):
    """Where the file system does not share locks."""
    monkeypatch.setattr(lock, "WATCH", 1.0)
    outcome.write(tmp_path, Standing("running", 3, 20))
    there = json.loads((tmp_path / "outcome.json").read_text()) | {"host": "elsewhere", "pid": 7}
    (tmp_path / "outcome.json").write_text(json.dumps(there))
    (tmp_path / "heartbeats").mkdir()
    beat = tmp_path / "heartbeats" / "rank_00000.json"
    beat.write_text('{"time": 1.0}')
    done = threading.Event()

    def live():
        while not done.wait(0.05):
            beat.with_suffix(".new").write_text(json.dumps({"time": time.time()}))
            os.replace(beat.with_suffix(".new"), beat)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere"):
            lock.RunLock(tmp_path).acquire()
    finally:
        done.set()
        thread.join()
    held = lock.RunLock(tmp_path)
    held.acquire()
    held.release()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock.RunLock(tmp_path).acquire()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a file system of its own")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_leaves_the_run_alive(straight, tmp_path, asynchronous):  # noqa: F811
    """A small file system under the run folder, without room for a checkpoint, or for a line of the metrics."""
    run_dir, config = tmp_path / "disk" / "run", recipe(checkpoint={"asynchronous": asynchronous})
    run_dir.parent.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", run_dir.parent], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    try:
        code, printed = train(run_dir, "full", 6, config=config, log=tmp_path / "log")
        assert code == outcome.FAILED and "WARNING: the checkpoint of step 8 could not be written" in printed, printed
        assert "stopped at step 20, but its checkpoint could not be saved" in printed
        (run_dir.parent / "filler").unlink()
        code, printed = train(run_dir, config=config, log=tmp_path / "log")
        assert code == 0 and "from step 4 " in printed, printed
        assert_same_weights(run_dir, straight)
        assert [r["step"] for r in records(run_dir) if r["kind"] == "train"] == [3, 6, 9, 12, 15, 18, 20]
    finally:
        subprocess.run(["umount", "-l", run_dir.parent], check=False)


def test_a_folder_that_becomes_read_only_leaves_the_run_alive(straight, tmp_path):  # noqa: F811
    run_dir = tmp_path / "run"
    code, printed = train(run_dir, "read-only", 6)
    for folder in (run_dir, checkpoint.folder_of(run_dir)):
        folder.chmod(0o755)
    assert code == outcome.FAILED and "Permission denied" in printed, printed
    assert "WARNING: the checkpoint of step 8 could not be written" in printed
    assert "stopped at step 20, but its checkpoint could not be saved" in printed
    assert train(run_dir)[0] == 0
    assert_same_weights(run_dir, straight)


def test_kills_while_a_checkpoint_is_written_beside_training_lose_nothing(straight, tmp_path):  # noqa: F811
    """SIGKILL at moments that sweep over the run, checkpoints being written in a thread all the time."""
    run_dir, config = tmp_path / "run", recipe(checkpoint={"asynchronous": True, "every": 1, "keep": 2})
    log = tmp_path / "log"
    steps = []
    for number in range(4):
        process, *_ = workers.start(train_run, config, run_dir, log=log)
        target = 4 * number + 3

        def reached(target=target):
            with contextlib.suppress(OSError):
                return any(p.name >= f"step_{target:08d}" for p in checkpoint.folder_of(run_dir).iterdir())

        wait_for(reached, process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        steps.append(checkpoint.step_of(checkpoint.latest(run_dir, pytest.fail)))
    assert steps == sorted(set(steps))
    assert train(run_dir, config=config)[0] == 0
    assert_same_weights(run_dir, straight)


def test_every_truncated_file_is_noticed(straight, tmp_path):  # noqa: F811
    """Each file of the newest checkpoint, cut to several lengths: the one before is taken, and the file named."""
    run_dir = tmp_path / "run"
    shutil.copytree(checkpoint.folder_of(straight), checkpoint.folder_of(run_dir))
    before, newest = checkpoint.checkpoints(run_dir)[-2:]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {"manifest.json", "trainer.json"} <= {path.name for path in files} and len(files) >= 5
    for file in files:
        whole = file.read_bytes()
        for length in {0, 1, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:length])
            said: list[str] = []
            assert checkpoint.latest(run_dir, said.append) == before, (file, length)
            assert len(said) == 1 and str(file) in said[0]
        file.write_bytes(whole)
    assert checkpoint.latest(run_dir, pytest.fail) == newest


def test_a_clock_that_jumps_changes_nothing(straight, tmp_path):  # noqa: F811
    code, printed = train(tmp_path / "run", "clock jump", 9)
    assert code == 0, printed
    assert_same_weights(tmp_path / "run", straight)


def test_a_flipped_bit_ends_the_run_and_names_the_rank(tmp_path):
    run_dir, config = tmp_path / "run", recipe(guard={"window": 8, "replicas_every": 2}, train={"micro_batch_size": 1})
    code, printed = train(run_dir, "flipped bit", 8, config=config, world=4)
    assert code != 0 and "rank 3" in printed and "model.norm.weight" in printed, printed
    assert "the last checkpoint is that of step 4" in printed
    assert checkpoint.step_of(checkpoint.checkpoints(run_dir)[-1]) == 4, "nothing is saved of it"
    assert train(tmp_path / "good", config=config, world=4)[0] == 0


def test_hosts_with_different_versions_are_refused(tmp_path):
    code, printed = train(tmp_path / "run", "other torch", world=2)
    assert code != 0 and "torch: " in printed and "2.0.0 on rank 1" in printed and "the same on every host" in printed
