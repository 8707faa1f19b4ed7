"""One run folder, one run: a second one is refused while the first is alive."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from riverrun.train import outcome

WATCH = 12.0  # seconds in which a living rank 0 writes a heartbeat
LEAVING = 10.0  # seconds for a run whose torchrun was killed: its ranks save and go


class RunLock:
    """Held from `acquire` until `release`, or until the process is gone, however it ends.

    The lock is one of the file system's, which holds between hosts only where the file system shares locks (NFS does,
    Lustre if it is mounted with `flock`). Therefore a run that claims to be running on another host is looked at, too:
    if its heartbeat goes on, it lives.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._file: int | None = None

    def acquire(self) -> None:
        """Creates the folder if it is not there.

        Raises:
            ValueError: another run has it; says which.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        until = time.monotonic() + LEAVING
        while not _locked(file):
            if time.monotonic() > until:
                os.close(file)
                raise ValueError(self._refusal(path.read_text(encoding="utf-8").strip() or "another process"))
            time.sleep(0.1)
        standing = outcome.read(self.run_dir)
        elsewhere = standing is not None and standing.state == "running" and standing.host != socket.gethostname()
        if elsewhere and self._lives():
            os.close(file)
            assert standing is not None
            raise ValueError(self._refusal(f"process {standing.pid} on {standing.host}"))
        os.truncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lives(self) -> bool:
        """Whether rank 0's heartbeat changes."""
        first, until = self._beat(), time.monotonic() + WATCH
        while first is not None and time.monotonic() < until:
            if self._beat() != first:
                return True
            time.sleep(0.1)
        return False

    def _beat(self) -> float | None:
        try:
            beat = json.loads((self.run_dir / "heartbeats" / "rank_00000.json").read_text(encoding="utf-8"))
            return float(beat["time"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _refusal(self, who: str) -> str:
        return (
            f"--run-dir {self.run_dir} is in use by {who}: wait for it, end it (`riverrun stop {self.run_dir}`), "
            "or name another folder"
        )


def _locked(file: int) -> bool:
    """Whether the lock is ours now. Where the file system has no locks it is; what is left there is the heartbeat."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
