"""A run that hangs ends, and says which rank it waited for.

Every rank tells its watchdog what it is about to do. Two threads watch it: one writes a heartbeat file every few
seconds, the other notices when a phase lasts too long. Then all ranks write their stacks into one folder, the lowest
of them names the rank that the others wait for, and they end with `outcome.STALLED`.

Seen: a rank that waits in a collective, in a system call or in any C code that released the interpreter's lock; a rank
that was stopped or killed, or whose host is gone (its heartbeat is old; the others report it, once they wait for it).
Not seen from within: C code that keeps the lock, as no thread of the process runs then. The other ranks still report it
as one whose heart does not beat, and a timer of faulthandler, which needs no lock, writes its stacks to
RUN_DIR/heartbeats/rank_XXXXX.stacks; among several ranks that timer also ends it (with 1), after twice the time. A rank
alone is not ended so, since the timer cannot tell a hang from a Ctrl-Z.

A run that was stopped and continued (Ctrl-Z, scontrol suspend) is not taken for one that hangs: time in which the
threads did not run does not count. Nothing here waits for the file system while it watches: with a file server that
hangs, a rank still ends, with a line on stderr and without a report.

Imports nothing heavy, so that it can watch over the imports of everything else.
"""

import contextlib
import faulthandler
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from riverrun.train import outcome
from riverrun.train.stall_report import (
    PHASES,
    Heartbeat,
    accuse,
    collectives,
    dumped,
    heartbeat_path,
    read_heartbeats,
    read_traces,
    replace_text,
    silent_for,
    table,
    write_heartbeat,
)

GRACE = 1.5  # beats in which the other ranks notice too, and write their stacks
SUCCESSORS = 3  # ranks that report in place of a lower one that dies over it
LATE = 10.0  # seconds that a report waits for the stacks of ranks that are alive
PATIENCE = 30.0  # seconds for a report, besides beats


def leave(message: str) -> None:
    """Ends the process whatever its other threads do."""
    os._exit(outcome.STALLED)


class Watchdog:
    """Watches over this process while it is entered.

    Files: heartbeats/rank_XXXXX.json, a `Heartbeat`, every `beat_seconds`. Of a stall: stalls/TIME/ with report.txt,
    rank_XXXXX.txt (Python stacks) and, where torch's flight recorder is on (TORCH_FR_BUFFER_SIZE),
    collectives_rank_N for `torchfrtrace`; stalls/latest points to it. A stall is reported at most two beats after its
    time is up; ten seconds later if some rank is slow to write its stacks.

    Args:
        run_dir: shared by all ranks. Failing to write there never stops training: it costs a warning.
        start_seconds: what a phase may take until the first optimiser step is done: compilation, the first collectives.
        stall_seconds: what a phase may take from then on.
        parent: end this process when the one that started it is gone, as a rank without its torchrun would keep a GPU
            for ever: with SIGTERM first, upon which a loop saves and leaves, and after `stall_seconds` at the latest.
            Not for a run started from a shell, which may outlive its terminal.
        on_stall: called with the message (empty: another rank reports) when all is written, to end the process.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        host: str,
        *,
        start_seconds: float,
        stall_seconds: float,
        beat_seconds: float = 5.0,
        parent: bool = False,
        on_stall: Callable[[str], None] = leave,
    ):
        self.run_dir, self.rank, self.world_size, self.host = run_dir, rank, world_size, host
        self.start_seconds, self.stall_seconds = start_seconds, stall_seconds
        # when a stall is noticed, the last heartbeat of a rank that stopped must be old
        self.beat_seconds = min(beat_seconds, stall_seconds / 5)
        self.on_stall = on_stall
        self._parent = os.getppid() if parent else 0
        self._orphaned = 0.0  # when it was noticed
        self._first: int | None = None  # the step that the run begins with
        self._beats, self._warned, self._summoned = 0, False, False
        self._entered: float | None = None  # by the file server's clock
        self._paused: tuple[object, float] = None, 0.0  # a phase, and how long the process did not run in it
        self._stacks: IO[bytes] | None = None
        self._arming = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch)]
        self.phase("start", 0)

    def phase(self, name: str, step: int, allow: float = 0.0) -> None:
        """The loop is about to do something else. Costs a microsecond.

        Args:
            name: of `PHASES`.
            step: optimiser steps done.
            allow: seconds that this may take, if that is more than others may.
        """
        assert name in PHASES, name
        if self._first is None and name != "start":
            self._first = step
        self._now = name, step, time.monotonic(), allow
        if allow:
            self._arm()

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.phase("end", self._now[1])
        self._stop.set()
        with self._arming:
            if self._stacks is not None:
                faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(self.beat_seconds)  # not for ever: the file system may hang

    # the first thread: writes

    def _beat(self) -> None:
        if self.rank == 0:
            self._try(lambda: (self.run_dir / "stalls" / "latest").unlink(missing_ok=True))
        while True:
            self._try(self._write_heartbeat)
            if self._stacks is None:
                self._try(self._open_stacks)
            if self._wait_for_a_beat():
                break
        self._try(self._write_heartbeat)
        if self._stacks is not None and os.fstat(self._stacks.fileno()).st_size == 0:
            self._try(lambda: self._stacks_path.unlink(missing_ok=True))

    def _wait_for_a_beat(self) -> bool:
        """Looks meanwhile whether another rank has noticed a stall. Returns whether this one has ended."""
        for _ in range(4):
            if self._stop.wait(self.beat_seconds / 4):
                return True
            self._summoned = self._summoned or self._called()
        return False

    def _write_heartbeat(self) -> None:
        name, step, since, _ = self._now
        self._beats += 1
        now = time.time()
        began = now - (time.monotonic() - since)
        write_heartbeat(self.run_dir, Heartbeat(self.rank, self.host, os.getpid(), step, name, began, now, self._beats))
        if self._entered is None:
            self._entered = heartbeat_path(self.run_dir, self.rank).stat().st_mtime

    @property
    def _stacks_path(self) -> Path:
        return heartbeat_path(self.run_dir, self.rank).with_suffix(".stacks")

    def _open_stacks(self) -> None:
        self._stacks = self._stacks_path.open("wb")

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            if not self._warned:
                self._warned = True
                _say(f"warning: rank {self.rank} cannot write heartbeats, training goes on: {error}")

    # the second thread: watches, and touches no file before it is time to end

    def _watch(self) -> None:
        last, armed = time.monotonic(), -1e9
        while not self._stop.wait(self.beat_seconds / 4):
            now = time.monotonic()
            if now - last > 3 * self.beat_seconds:
                self._pardon(now - last)
            last = now
            if now - armed > self.beat_seconds:
                armed = now
                self._arm()
            if self._parent and os.getppid() != self._parent:
                self._end_orphan(now)
            if self._stalled(now) or self._summoned:
                self._end()
                return

    def _stalled(self, now: float) -> bool:
        phase = self._now
        name, _, since, _ = phase
        pause = self._paused[1] if self._paused[0] is phase else 0.0
        return name != "end" and now - since - pause > self._limit(phase)

    def _limit(self, phase: tuple[str, int, float, float]) -> float:
        started = self._first is not None and phase[1] > self._first
        return max(self.stall_seconds if started else self.start_seconds, phase[3])

    def _pardon(self, seconds: float) -> None:
        """The process was stopped, or a call kept the interpreter's lock."""
        phase = self._now
        before = self._paused[1] if self._paused[0] is phase else 0.0
        self._paused = phase, before + seconds

    def _called(self) -> bool:
        """Whether another rank has noticed a stall."""
        try:
            written = (self.run_dir / "stalls" / "latest").lstat().st_mtime
        except OSError:
            return False
        return self._entered is not None and written > self._entered

    def _arm(self) -> None:
        """Puts off the timer that needs no lock: until well after the others have reported this rank."""
        with self._arming:
            if self._stacks is not None and not self._stop.is_set():
                seconds = 2 * self._limit(self._now) + 6 * self.beat_seconds + PATIENCE
                faulthandler.dump_traceback_later(seconds, file=self._stacks, exit=self.world_size > 1)

    def _end_orphan(self, now: float) -> None:
        if not self._orphaned:
            self._orphaned = now
            _say(f"rank {self.rank}: the process that started it is gone; saving and leaving")
            os.kill(os.getpid(), signal.SIGTERM)
        elif now - self._orphaned > self.stall_seconds and self._now[0] != "save":
            _say(f"rank {self.rank}: the process that started it is gone, and it did not leave: ended")
            os._exit(outcome.FAILED)

    # the end

    def _end(self) -> None:
        answer = [""]
        self._arm()

        def report() -> None:
            answer[0] = self._report()

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        thread.join((GRACE + 2 * SUCCESSORS + 4) * self.beat_seconds + PATIENCE)
        if thread.is_alive():
            name, step, since, _ = self._now
            _say(
                f"rank {self.rank} on {self.host} stalled in '{name}' of step {step} for {time.monotonic() - since:.0f}"
                f" s, and the report cannot be written: the file system of {self.run_dir} hangs"
            )
        self.on_stall(answer[0])

    def _report(self) -> str:
        """Writes this rank's stacks, and everyone's report if it falls to this rank. Returns the message, or ""."""
        folder = self._agree()
        try:
            self._dump(folder)
        except OSError as error:
            _say(f"rank {self.rank} on {self.host} stalled, and its stacks cannot be written: {error}")
        # not all of thousands of ranks need to read the files of all
        before = read_heartbeats(self.run_dir, self.world_size) if self._lower(folder) <= SUCCESSORS else {}
        self._pause(GRACE)
        lower = self._lower(folder)
        for _ in range(min(lower, SUCCESSORS) * 8):
            if (folder / "report.txt").exists():
                return ""
            self._pause(0.25)
        if lower > SUCCESSORS or not _claim(folder / "reporter"):
            until = time.monotonic() + 2 * self.beat_seconds + 1.5 * LATE
            while not (folder / "report.txt").exists() and time.monotonic() < until:
                self._pause(0.25)
            return ""
        return self._conclude(folder, before)

    def _conclude(self, folder: Path, before: dict[int, tuple[Heartbeat, float]]) -> str:
        until = time.monotonic() + LATE
        while True:
            after, now = read_heartbeats(self.run_dir, self.world_size), time.time()
            # one that wrote its stacks lives, though reading the flight recorder may keep its heart from beating
            silent = silent_for(before, after, self.beat_seconds)
            silent = {rank: age for rank, age in silent.items() if rank not in dumped(folder)}
            alive = {rank for rank, (beat, _) in after.items() if rank not in silent and beat.phase != "end"}
            if alive <= read_traces(folder).keys() or time.monotonic() > until:
                break
            self._pause(0.25)
        beats = {rank: beat for rank, (beat, _) in after.items()}
        if not beats:
            name, step, since, _ = self._now
            seconds = time.monotonic() - since
            beats = {self.rank: Heartbeat(self.rank, self.host, os.getpid(), step, name, now - seconds, now, 0)}
        reason = accuse(beats, silent, self.world_size, now, read_traces(folder), self.host)
        message = f"training stalled: {reason}. Stacks of all ranks: {folder}"
        standing = outcome.read(self.run_dir) or outcome.Standing("failed", self._now[1], self._now[1])
        standing = replace(
            standing, state="failed", step=max(standing.step, self._now[1]), exit_code=outcome.STALLED, message=message
        )
        try:
            outcome.write(self.run_dir, standing)
        except OSError as error:
            _say(f"cannot write how the run ended: {error}")
        _say(message)
        try:  # last: the others leave when they see it
            replace_text(
                folder / "report.txt", "\n".join([message, "", *table(beats, silent, dumped(folder), now)]) + "\n"
            )
        except OSError as error:
            _say(f"cannot write {folder / 'report.txt'}: {error}")
        return message

    def _agree(self) -> Path:
        """The folder of this stall: the first rank to notice it names it, in a link that can be made only once."""
        stalls = self.run_dir / "stalls"
        link, name = stalls / "latest", time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        try:
            stalls.mkdir(parents=True, exist_ok=True)
            if not self._called():
                link.unlink(missing_ok=True)  # of an earlier run in this folder
                with contextlib.suppress(FileExistsError):  # another rank was faster
                    link.symlink_to(name)
            name = os.readlink(link)
        except OSError:  # no links there: a folder for every rank that notices, but stacks all the same
            pass
        folder = stalls / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _say(f"rank {self.rank} cannot write to {folder}: {error}")
        return folder

    def _dump(self, folder: Path) -> None:
        name, step, since, _ = self._now
        fresh = folder / f"rank_{self.rank:05d}.txt.partial"
        with fresh.open("w", encoding="utf-8") as file:
            seconds = time.monotonic() - since
            file.write(
                f"rank {self.rank} on {self.host}, pid {os.getpid()}, '{name}' of step {step} for {seconds:.1f} s\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        os.replace(fresh, fresh.with_suffix(""))
        trace = _flight_recorder()  # may take seconds
        if trace:
            (folder / f"collectives_rank_{self.rank}").write_bytes(trace)
        last = collectives(pickle.loads(trace)) if trace else {}
        replace_text(folder / f"rank_{self.rank:05d}.json", json.dumps(last))

    def _lower(self, folder: Path) -> int:
        """Ranks that come before this one to report."""
        return sum(rank < self.rank for rank in dumped(folder))

    def _pause(self, beats: float) -> None:
        time.sleep(beats * self.beat_seconds)


def _claim(path: Path) -> bool:
    """Whether this process is the first; true too if the folder cannot be written, for a message twice is better than
    none."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _flight_recorder() -> bytes | None:
    """torch's record of the last collectives, if torch is loaded and keeps one."""
    module = sys.modules.get("torch._C._distributed_c10d")
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):  # the second: of gloo, and in builds without NCCL
        dump = getattr(module, name, None)
        try:
            trace = dump() if dump is not None else b""
            if trace and pickle.loads(trace).get("entries"):
                return trace
        except Exception as error:  # whatever it is: the stacks matter more
            _say(f"torch's flight recorder cannot be read: {type(error).__name__}: {error}")
    return None


def _say(message: str) -> None:
    """On stderr, past Python's own buffer, whose lock the thread that hangs may hold."""
    terminal = os.isatty(2)
    os.write(2, (b"\x1b[?25h\n" if terminal else b"") + message.encode() + b"\n")  # a progress bar hid the cursor
