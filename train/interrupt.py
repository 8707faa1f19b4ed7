"""Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once."""

import os
import signal
import sys
import threading
import time
from types import FrameType

ECHO_SECONDS = 1.0  # torchrun passes on a Ctrl-C that the terminal sent to the workers already


class Interrupt:
    """While it is entered (in the main thread), `signal` is the number of the first SIGINT or SIGTERM, or 0."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
