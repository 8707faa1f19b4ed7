"""The watchdog, with real processes that hang, stop, are slow, or lose their parent. None of them loads torch."""

import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from riverrun.train import outcome
from riverrun.train.stall_report import Heartbeat, read_heartbeats

BEAT, STALL, START = 0.3, 1.5, 60.0
GIVE_UP = 120.0
# what every rank runs; `barrier` stands for a collective: ranks wait in it for all the others
RANK = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from riverrun.train.watchdog import Watchdog

run_dir, rank, world, stall, beat, start = Path(sys.argv[1]), *map(float, sys.argv[2:7])
rank, world = int(rank), int(world)

def barrier(name):
    Path(run_dir.parent, f"{name}.{rank}").touch()
    while not all(Path(run_dir.parent, f"{name}.{r}").exists() for r in range(world)):
        time.sleep(0.01)

def watchdog(**options):
    return Watchdog(run_dir, rank, world, f"host{rank // 2}", start_seconds=start, stall_seconds=stall,
                    beat_seconds=beat, **options)

def hang():
    threading.Event().wait()

def steps(dog, first, last):
    for step in range(first, last):
        for phase in ("data", "forward", "step"):
            dog.phase(phase, step)
            barrier(f"{phase}{step}")
"""


class Ranks:
    """`world` processes that run the same code."""

    def __init__(self, folder: Path, code: str, world: int = 1, *, stall=STALL, beat=BEAT, start=START):
        self.folder, self.run_dir = folder, folder / "run"
        self.run_dir.mkdir(exist_ok=True)
        program = RANK + textwrap.dedent(code)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(self.run_dir), *map(str, (rank, world, stall, beat, start))],
                stderr=(folder / f"stderr.{rank}").open("w"),
            )
            for rank in range(world)
        ]

    def wait(self, *ranks: int) -> list[int]:
        chosen = [self.processes[rank] for rank in ranks or range(len(self.processes))]
        return [process.wait(GIVE_UP) for process in chosen]

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr.{rank}").read_text()

    def beat(self, rank: int) -> Heartbeat | None:
        found = read_heartbeats(self.run_dir, rank + 1).get(rank)
        return found and found[0]

    def until(self, condition) -> None:
        end = time.monotonic() + GIVE_UP
        while not condition():
            assert time.monotonic() < end, [self.stderr(rank) for rank in range(len(self.processes))]
            time.sleep(0.02)

    def stall(self) -> Path:
        """The folder of the only stall."""
        [folder] = [path for path in (self.run_dir / "stalls").iterdir() if not path.is_symlink()]
        return folder


@pytest.fixture
def start(tmp_path):
    started = []

    def start(code, world=1, **options):
        started.append(Ranks(tmp_path, code, world, **options))
        return started[-1]

    yield start
    for ranks in started:
        for process in ranks.processes:
            process.kill()
            process.wait()


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def test_a_rank_that_hangs_is_named_once_and_all_end(start):
    ranks = start(
        """
        with watchdog() as dog:
            steps(dog, 0, 2)
            dog.phase("data", 2)
            if rank == 2:
                hang()
            dog.phase("forward", 2)
            barrier("never")
        """,
        world=3,
    )
    assert ranks.wait() == [outcome.STALLED] * 3
    told = [line for rank in range(3) for line in lines(ranks.stderr(rank))]
    assert len(told) == 1
    found = re.search(
        r"training stalled: rank 2 on host1 is behind, in 'data' of step 2 for (\d+) s, "
        r"while the 2 others are in 'forward' of step 2\. Stacks of all ranks: (.*)",
        told[0],
    )
    assert found, told
    folder = ranks.stall()
    assert Path(found[2]) == folder == (ranks.run_dir / "stalls" / "latest").resolve()
    for rank in range(3):
        stacks = (folder / f"rank_{rank:05d}.txt").read_text()
        assert ("in hang" in stacks) == (rank == 2) and ("in barrier" in stacks) == (rank != 2)
    report = (folder / "report.txt").read_text()
    assert report.startswith(told[0]) and len(lines(report)) == 1 + 1 + 3
    standing = outcome.read(ranks.run_dir)
    assert standing and (standing.state, standing.exit_code, standing.step) == ("failed", outcome.STALLED, 2)
    assert standing.message == told[0]


def test_a_stopped_rank_is_the_one_whose_heart_does_not_beat(start):
    ranks = start(
        """
        with watchdog() as dog:
            steps(dog, 0, 2)
            steps(dog, 2, 1000000)
        """,
        world=3,
    )
    ranks.until(lambda: (ranks.folder / "step3.1").exists())
    ranks.processes[1].send_signal(signal.SIGSTOP)
    assert ranks.wait(0, 2) == [outcome.STALLED] * 2
    assert re.search(r"rank 1 on host0 wrote no heartbeat for \d+ s, last in '\w+' of step \d+", ranks.stderr(0))
    assert {path.name for path in ranks.stall().glob("*.txt")} == {"rank_00000.txt", "rank_00002.txt", "report.txt"}
    assert "no stacks" in (ranks.stall() / "report.txt").read_text()
    ranks.processes[1].send_signal(signal.SIGCONT)
    assert ranks.wait(1) == [outcome.STALLED], "once it runs again, it leaves too"
    assert "training stalled" not in ranks.stderr(1) + ranks.stderr(2)


def test_the_report_waits_for_a_rank_that_is_slow_to_write(start):
    ranks = start(
        """
        def slow_dump(dog, folder, dump=Watchdog._dump):
            time.sleep(5 * beat)
            dump(dog, folder)

        if rank == 1:
            Watchdog._dump = slow_dump
        with watchdog() as dog:
            steps(dog, 0, 2)
            dog.phase("step", 2)
            barrier("never" if rank else "ever")
        """,
        world=2,
    )
    assert ranks.wait() == [outcome.STALLED] * 2
    assert "all 2 ranks hang in 'step' of step 2" in ranks.stderr(0)
    assert "no stacks" not in (ranks.stall() / "report.txt").read_text()


def test_a_killed_rank(start):
    ranks = start("with watchdog() as dog:\n    steps(dog, 0, 1000000)", world=2)
    ranks.until(lambda: (ranks.folder / "step3.1").exists())
    ranks.processes[1].kill()
    assert ranks.wait(0) == [outcome.STALLED]
    assert "rank 1 on host0 wrote no heartbeat for" in ranks.stderr(0)


def test_a_slow_rank_lives(start):
    """Each of its phases is shorter than the limit, all of them together are much longer."""
    ranks = start(
        """
        with watchdog() as dog:
            dog.phase("data", 0)
            for step in range(1, 7):
                dog.phase("data", step)
                time.sleep(0.4 * stall)
        """
    )
    assert ranks.wait() == [0]
    beat = ranks.beat(0)
    assert beat and (beat.phase, beat.step, beat.rank, beat.host) == ("end", 6, 0, "host0")
    assert beat.pid == ranks.processes[0].pid
    assert not (ranks.run_dir / "stalls").exists() and ranks.stderr(0) == ""
    assert [path.name for path in (ranks.run_dir / "heartbeats").iterdir()] == ["rank_00000.json"]


def test_phases_that_may_take_longer(start):
    """The first step has its own limit, and a phase may ask for more; then the same pause is a stall."""
    ranks = start(
        """
        with watchdog() as dog:
            dog.phase("forward", 7)
            time.sleep(2 * stall)
            dog.phase("save", 8, allow=100 * stall)
            time.sleep(2 * stall)
            Path(run_dir, "so far").touch()
            dog.phase("evaluate", 8)
            hang()
        """,
    )
    assert ranks.wait() == [outcome.STALLED] and (ranks.run_dir / "so far").exists()
    assert "rank 0 on host0 hangs in 'evaluate' of step 8" in ranks.stderr(0)


def test_the_first_step_has_a_limit_too(start):
    ranks = start('with watchdog() as dog:\n    dog.phase("forward", 7)\n    hang()', start=0.5)
    assert ranks.wait() == [outcome.STALLED] and "hangs in 'forward' of step 7" in ranks.stderr(0)


def test_a_call_into_c_that_released_the_lock(start):
    ranks = start(
        """
        with watchdog() as dog:
            dog.phase("data", 0)
            dog.phase("step", 1)
            ctypes.CDLL(None).sleep(100000)
        """
    )
    assert ranks.wait() == [outcome.STALLED] and "hangs in 'step' of step 1" in ranks.stderr(0)
    assert "<module>" in (ranks.stall() / "rank_00000.txt").read_text()


def test_a_call_into_c_that_keeps_the_lock(start):
    """No thread of that rank runs any more: the others name it, and the timer writes its stacks and ends it."""
    ranks = start(
        """
        from riverrun.train import watchdog as module
        module.PATIENCE = 0.0  # else the timer waits that long for a report

        def keep_the_lock():
            ctypes.PyDLL(None).sleep(100000)

        with watchdog() as dog:
            steps(dog, 0, 2)
            dog.phase("data", 2)
            if rank == 1:
                while not Path(run_dir, "heartbeats", "rank_00001.stacks").exists():
                    time.sleep(0.01)
                time.sleep(2 * beat)  # the timer is set every beat
            barrier("armed")
            if rank == 1:
                keep_the_lock()
            dog.phase("forward", 2)
            barrier("never")
        """,
        world=2,
    )
    assert ranks.wait() == [outcome.STALLED, 1]
    assert "rank 1 on host0 wrote no heartbeat for" in ranks.stderr(0)
    stacks = (ranks.run_dir / "heartbeats" / "rank_00001.stacks").read_text()
    assert "in keep_the_lock" in stacks


def test_a_run_that_was_stopped_and_continued_lives(start):
    """Ctrl-Z for longer than a stall."""
    ranks = start(
        """
        with watchdog() as dog:
            dog.phase("data", 0)
            dog.phase("forward", 1)
            Path(run_dir, "stop me").touch()
            while not Path(run_dir, "go on").exists():
                time.sleep(0.01)
            time.sleep(5 * beat)  # in which a watchdog that counted the pause would bite
        """
    )
    ranks.until(lambda: (ranks.run_dir / "stop me").exists())
    ranks.processes[0].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    while time.monotonic() < stopped + 2 * STALL:
        time.sleep(0.05)
    (ranks.run_dir / "go on").touch()
    ranks.processes[0].send_signal(signal.SIGCONT)
    assert ranks.wait() == [0] and ranks.stderr(0) == ""


ORPHAN = """
def on_term(number, frame):
    Path(run_dir, "asked").touch()
    if {leaves}:
        sys.exit(0)

if os.fork():  # as torchrun, which is killed
    while not Path(run_dir, "ready").exists():
        time.sleep(0.01)
    os._exit(0)
signal.signal(signal.SIGTERM, on_term)
with watchdog(parent={parent}) as dog:
    dog.phase("data", 0)
    Path(run_dir, "pid").write_text(str(os.getpid()))
    Path(run_dir, "ready").touch()
    count = 0
    while not Path(run_dir, "enough").exists():
        count += 1
        dog.phase("data", count)
        time.sleep(0.01)
"""


def orphan(start, **options) -> tuple[Ranks, int]:
    ranks = start(ORPHAN.format(**options))
    assert ranks.wait() == [0]
    return ranks, int((ranks.run_dir / "pid").read_text())


def running(pid: int) -> bool:
    """Whether that process still runs; one that ended may wait for an init that does not collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("leaves", [True, False])
def test_an_orphan_is_asked_to_leave_and_then_ended(start, leaves):
    ranks, pid = orphan(start, parent=True, leaves=leaves)
    ranks.until(lambda: not running(pid))
    assert (ranks.run_dir / "asked").exists()
    assert "the process that started it is gone; saving and leaving" in ranks.stderr(0)
    assert ("it did not leave: ended" in ranks.stderr(0)) == (not leaves)


def test_a_run_from_a_shell_outlives_it(start):
    ranks, pid = orphan(start, parent=False, leaves=True)
    beat = ranks.beat(0)
    ranks.until(lambda: ranks.beat(0) and ranks.beat(0).beats > (beat.beats if beat else 0) + 5)
    assert running(pid) and not (ranks.run_dir / "asked").exists()
    (ranks.run_dir / "enough").touch()
    ranks.until(lambda: not running(pid))


def test_a_folder_that_cannot_be_written_is_a_warning(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "heartbeats").write_text("a file")  # root may write to any folder
    ranks = start(
        """
        with watchdog() as dog:
            for step in range(20):
                dog.phase("data", step)
                time.sleep(beat)
        """
    )
    assert ranks.wait() == [0]
    [warning] = lines(ranks.stderr(0))
    assert warning.startswith("warning: rank 0 cannot write heartbeats, training goes on:")


def test_a_stall_without_a_folder_still_ends(start, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("heartbeats", "stalls"):
        (tmp_path / "run" / name).write_text("a file")
    ranks = start('with watchdog() as dog:\n    dog.phase("data", 0)\n    dog.phase("data", 1)\n    hang()')
    assert ranks.wait() == [outcome.STALLED]
    assert "training stalled: rank 0 on host0 hangs in 'data' of step 1" in ranks.stderr(0)


def test_a_file_server_that_hangs(start, tmp_path):
    """Opening a pipe without a reader waits for ever, as a write to a dead server does."""
    (tmp_path / "run" / "heartbeats").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / "heartbeats" / "rank_00000.json.partial")
    assert stat.S_ISFIFO((tmp_path / "run" / "heartbeats" / "rank_00000.json.partial").stat().st_mode)
    ranks = start('with watchdog() as dog:\n    dog.phase("data", 0)\n    dog.phase("data", 1)\n    hang()')
    assert ranks.wait() == [outcome.STALLED]
    assert "training stalled" in ranks.stderr(0)


def test_a_report_that_hangs_does_not_keep_the_rank(start):
    ranks = start(
        """
        from riverrun.train import watchdog as module
        module.PATIENCE = 0.0
        with watchdog() as dog:
            dog.phase("data", 0)
            dog.phase("data", 1)
            while not Path(run_dir, "heartbeats", "rank_00000.json").exists():
                time.sleep(0.01)
            os.mkfifo(run_dir / "outcome.json.partial")
            hang()
        """
    )
    assert ranks.wait() == [outcome.STALLED]
    assert "the report cannot be written: the file system of" in ranks.stderr(0)


def test_an_earlier_stall_in_the_same_folder(start, tmp_path):
    """Its link and its heartbeats are there; they neither end the new run nor take its stacks."""
    code = """
        with watchdog() as dog:
            steps(dog, {first}, {first} + 2)
            if rank == 1:
                hang()
            dog.phase("step", {first} + 3)
            barrier("never")
        """
    ranks = start(code.format(first=0), world=2)
    assert ranks.wait() == [outcome.STALLED] * 2
    old = ranks.stall().rename(ranks.run_dir / "stalls" / "2026-01-01T00-00-00Z")
    (ranks.run_dir / "stalls" / "latest").unlink()
    (ranks.run_dir / "stalls" / "latest").symlink_to(old.name)
    before = sorted((path, path.stat().st_mtime_ns) for path in old.iterdir())
    time.sleep(0.05)  # clocks of file systems tick
    ranks = start(code.format(first=10), world=2)
    assert ranks.wait() == [outcome.STALLED] * 2
    assert "rank 1 on host0 is behind, in 'step' of step 11" in ranks.stderr(0)
    assert sorted((path, path.stat().st_mtime_ns) for path in old.iterdir()) == before
    assert (ranks.run_dir / "stalls" / "latest" / "report.txt").exists()


def test_the_collective_that_a_rank_did_not_join(start, monkeypatch):
    """Both ranks are in the same phase: torch's flight recorder tells them apart."""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    ranks = start(
        """
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo", init_method=(run_dir.parent / "store").as_uri(), rank=rank, world_size=world)
        with watchdog() as dog:
            for step in range(3):
                dog.phase("forward", step)
                if step == 2 and rank == 1:
                    hang()
                dist.all_reduce(torch.ones(3))
        """,
        world=2,
    )
    assert ranks.wait() == [outcome.STALLED] * 2
    assert re.search(
        r"rank 1 on host0 did not join gloo:all_reduce 3 from .*:\d+ of process group 0 default_pg, "
        r"in 'forward' of step 2 for \d+ s",
        ranks.stderr(0),
    ), ranks.stderr(0)
    for rank, started in ((0, 3), (1, 2)):  # as torchfrtrace reads them
        trace = pickle.loads((ranks.stall() / f"collectives_rank_{rank}").read_bytes())
        assert [entry["collective_seq_id"] for entry in trace["entries"]] == list(range(1, started + 1))


def test_a_phase_costs_next_to_nothing(start):
    """Far less than a millisecond, which a step would not notice either: no file is touched."""
    ranks = start(
        """
        with watchdog() as dog:
            begun = time.process_time()
            for step in range(20000):
                dog.phase("data", step)
            print((time.process_time() - begun) / 20000, file=sys.stderr)
        """
    )
    assert ranks.wait() == [0] and float(ranks.stderr(0)) < 1e-4


def test_it_loads_nothing_heavy():
    code = "import sys, riverrun.train.watchdog; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
