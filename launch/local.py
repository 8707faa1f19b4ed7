"""Training on this host: torchrun as a child, started again after a crash as long as the run gets on.

torchrun tells of its ranks' ends only that some of them failed; how a run ended is in its `outcome.json`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from riverrun.launch import run_folder
from riverrun.train import outcome

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_SECONDS = 300  # for ranks that save after one of them, or torchrun, was signalled
FRUITLESS = 1  # crashes without a new checkpoint after which a run is started once more


def command(arguments: Sequence[str], nproc: int) -> list[str]:
    """torchrun with `nproc` ranks of `riverrun train ARGUMENTS`."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc),
        "--max-restarts", "0", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "--shutdown-timeout", str(GRACE_SECONDS), "-m", "riverrun.launch.cli", "train", *arguments,
    ]  # fmt: skip


def run(words: Sequence[str], run_dir: Path, restarts: int, say: Callable[[str], None]) -> int:
    """Runs a command that trains in `run_dir`, and again after crashes. Call it in the main thread.

    SIGUSR1 asks the run to save and to be started again, SIGTERM, SIGHUP and SIGINT to save and stop; a second SIGINT
    kills it.

    Args:
        words: the command; what it does after a crash must be to go on from the newest checkpoint.
        run_dir: exists.
        restarts: how often to start again. A crash with a new checkpoint since the start before leads to another start,
            one without a new checkpoint does so once.
        say: is told what happens.

    Returns:
        outcome.json's exit code, or the command's if it did not come so far as to write one.
    """
    outcome.withdraw(run_dir)
    child, fruitless, code = _Child(run_dir, say), 0, outcome.FAILED
    with child.signals():
        for left in range(restarts, -1, -1):
            before = run_folder.newest_step(run_dir)
            code = child.run(words)
            after = run_folder.newest_step(run_dir)
            stopping = outcome.stop_request(run_dir) is not None
            if stopping or code in (outcome.FINISHED, outcome.STOPPED, outcome.USER_ERROR):
                break
            fruitless = 0 if after > before else fruitless + 1
            what = f"the run ended with code {code}; newest checkpoint: {f'step {after}' if after >= 0 else 'none'}"
            if fruitless > FRUITLESS:
                say(f"{what}, as before the last {fruitless} starts. Not started again: mend it, then launch it again")
                break
            if left:
                say(f"{what}. Starting again ({left} of --restarts {restarts} left)")
            elif restarts:
                say(f"{what}. Not started again, as --restarts {restarts} are used up: launch it again to go on")
    return code


class _Child:
    """The command while it runs, and what signals to this process do to it."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]):
        self._run_dir, self._say = run_dir, say
        self._pid = self._interrupts = 0

    def run(self, words: Sequence[str]) -> int:
        """Starts the command, waits for it, and returns how the run ended."""
        began = time.time()
        # a session of its own: Ctrl-C in a terminal reaches this process alone, which asks the run to stop
        # NCCL keeps its last collectives, for the report of a hang
        environment = {"TORCH_FR_BUFFER_SIZE": "2000", **os.environ}
        process = subprocess.Popen(words, env=environment, start_new_session=True)
        self._pid = process.pid
        returned = process.wait()
        self._pid = 0
        standing = outcome.read(self._run_dir)
        if standing is None or standing.time < began or standing.state == "running":
            return returned if returned > 0 else outcome.FAILED  # below 0: a signal; 0: it did not train
        return standing.exit_code

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        ignored = {number for number in HANDLED if signal.getsignal(number) == signal.SIG_IGN}  # nohup's SIGHUP
        before = {number: signal.signal(number, self._receive) for number in HANDLED if number not in ignored}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 and number == signal.SIGINT:
            self._say("killed; what was saved is intact")
            for pid in (*_descendants(self._pid), self._pid) if self._pid else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif number == signal.SIGUSR1:
            outcome.request_stop(self._run_dir, "requeue")
            self._say("SIGUSR1: the run saves after its current step and ends with code 85, to be started again")
        else:
            outcome.request_stop(self._run_dir, "stop")
            kill = "; Ctrl-C again kills it" if number == signal.SIGINT else ""
            self._say(f"{signal.Signals(number).name}: the run saves after its current step and ends{kill}")


def _descendants(pid: int) -> list[int]:
    """The processes below `pid`: torchrun puts each of its ranks into a session of its own."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                parent = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
