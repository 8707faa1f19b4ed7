"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave. A second Ctrl-C leaves at once.

SIGUSR1 is what schedulers send ahead of a preemption or a time limit: the run is to be started again.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from riverrun.train import outcome

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.5
ECHO_SECONDS = 1.0  # torchrun passes on a Ctrl-C that the terminal sent to the workers already


class Interrupt:
    """While it is entered (in the main thread), `signal` is the number of the first of `SIGNALS`, or 0."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif number == signal.SIGINT and now - self._since > ECHO_SECONDS:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the progress bar hid the cursor
            os._exit(128 + number)


class StopRequests:
    """What somebody asked the run for by a file (`outcome.request_stop`); None: a rank that does not look."""

    def __init__(self, run_dir: Path | None):
        self._run_dir, self._next = run_dir, 0.0
        self._asked: outcome.Reason | None = None

    def asked(self) -> outcome.Reason | None:
        now = time.monotonic()
        if self._run_dir is not None and now >= self._next:
            self._asked, self._next = outcome.stop_request(self._run_dir), now + POLL_SECONDS
        return self._asked
