"""How a run stands, in `RUN_DIR/outcome.json`, and how it is asked to stop: between a run and whoever started it.

torchrun turns every exit code of a rank but 0 into 1, and kills the other ranks; so ranks that stopped as they were
asked to exit with 0 under it, and the code that tells what happened is in the file.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FINISHED, FAILED, USER_ERROR = 0, 1, 2
STOPPED = 85  # saved, and to be started again: preempted, or at a time limit
BAD_NODE = 86  # the check before training found a node that must not be used
STALLED = 87  # a rank hung: the watchdog ended it

State = Literal["running", "finished", "stopped", "failed"]
Reason = Literal["stop", "requeue"]
REASONS: tuple[Reason, ...] = ("stop", "requeue")


@dataclass(frozen=True)
class Standing:
    """What `outcome.json` says.

    Attributes:
        step, steps: optimiser steps done when it was written, and those the run is to do.
        saved_step: the newest checkpoint's; -1: there is none.
        exit_code: see the constants above; of a run that is running, what becomes of it if nobody writes another.
        message: for the user.
        host, pid: of rank 0.
        job: the SLURM job, or "".
        time: when it was written, in seconds since 1970.
    """

    state: State
    step: int
    steps: int
    saved_step: int = -1
    exit_code: int = FAILED
    message: str = ""
    host: str = ""
    pid: int = 0
    job: str = ""
    time: float = 0.0


def write(run_dir: Path, standing: Standing) -> None:
    """Replaces the file; a reader sees the old one or the new one."""
    here = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    fresh = run_dir / "outcome.json.partial"
    fresh.write_text(json.dumps(asdict(standing) | here, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, run_dir / "outcome.json")


def read(run_dir: Path) -> Standing | None:
    """None if there is none yet, or what is there was not written by `write`."""
    try:
        return Standing(**json.loads((run_dir / "outcome.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def request_stop(run_dir: Path, reason: Reason) -> None:
    """Asks a run to save and leave after its current step. A stop is not overruled by a later request to requeue.

    Raises:
        OSError: the run folder is not there, or cannot be written to.
    """
    if stop_request(run_dir) != "stop":
        fresh = run_dir / f"stop-request.{os.getpid()}"
        fresh.write_text(reason, encoding="utf-8")
        os.replace(fresh, run_dir / "stop-request")


def stop_request(run_dir: Path) -> Reason | None:
    """What a run was asked for last; None: nothing."""
    try:
        text = (run_dir / "stop-request").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return next((reason for reason in REASONS if reason == text), "stop")


def withdraw(run_dir: Path) -> None:
    """Whoever starts a run anew takes back the request that ended it."""
    (run_dir / "stop-request").unlink(missing_ok=True)
