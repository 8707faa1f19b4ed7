"""Writes checkpoints, beside training or in its place.

A save begins with a copy of what this rank has to write, in the host's memory; that is what training waits for. Then a
thread writes the files, waits until they are on disk and takes their checksums. Once that is over on every rank, which
the training loop learns with the sums of its next steps, `finish` gathers the checksums, and rank 0 writes the manifest
and renames the folder; the thread deletes older ones. All collectives are in the main thread. Folder and files: see
`checkpoint`.
"""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from riverrun.train import checkpoint, manifest
from riverrun.train import engine as engines
from riverrun.train.distributed import Ranks
from riverrun.train.snapshot import snapshot
from riverrun.train.state_passing import FOLDER

Write = Callable[[Any, Path], None]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk. `stall` seconds of training were lost on rank 0, of `seconds` in all for writing
    its `bytes` on all ranks. `undeleted`: why an older one is still there that was to be deleted before, or None."""

    step: int
    path: Path
    stall: float
    seconds: float
    bytes: int
    undeleted: str | None


@dataclass
class _Pending:
    step: int
    partial: Path
    began: float
    stall: float = 0.0
    work: Future = field(default_factory=Future)


class Saver:
    """Every rank calls every method alike.

    Args:
        keep: the newest checkpoints that stay, besides the last known good one.
        asynchronous: write in a thread; otherwise `start` writes, and `finish` has nothing to wait for.
    """

    def __init__(self, run_dir: Path, keep: int, ranks: Ranks, asynchronous: bool):
        self.run_dir, self.keep, self.ranks, self.asynchronous = run_dir, keep, ranks, asynchronous
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._deleted: Future = Future()
        self._deleted.set_result(None)

    def start(self, step: int, engine: engines.Engine, state: dict[str, Any]) -> None:
        """Begins to write the checkpoint of `step`.

        Args:
            state: goes into trainer.json; rank 0's counts.

        Raises:
            OSError: some rank could not begin, on all ranks alike. Earlier checkpoints are untouched.
        """
        assert self._pending is None, "finish the last one first"
        began = time.perf_counter()
        final = checkpoint.folder_of(self.run_dir) / f"step_{step:08d}"
        partial = final.with_name(final.name + checkpoint.PARTIAL)
        pending = _Pending(step, partial, began)

        def prepare() -> None:
            if self.ranks.rank == 0:
                checkpoint.remove(partial)
                (partial / engines.TAG).mkdir(parents=True)
                (partial / "rng").mkdir()
                if engine.states is not None:
                    (partial / FOLDER).mkdir()

        files: list[tuple[Any, Path]] = []

        def collect(value: Any, path: Path) -> None:
            files.append((snapshot(value) if self.asynchronous else value, path))
            if not self.asynchronous:
                torch.save(value, path)

        def take() -> None:
            engine.save(partial, collect, slices=self.asynchronous)
            collect(checkpoint.rng_state(), partial / "rng" / f"rank_{self.ranks.rank:05d}.pt")

        try:
            checkpoint.together(prepare, self.ranks)
            checkpoint.together(take, self.ranks)
        except OSError:
            self._discard(partial)
            raise
        text = json.dumps(state, indent=1) if self.ranks.rank == 0 else None  # now: training goes on changing it
        unwritten = files if self.asynchronous else [(None, path) for _, path in files]
        pending.work = self._run(_write, partial, unwritten, text)
        pending.stall = time.perf_counter() - began
        self._pending = pending

    @property
    def pending(self) -> int | None:
        """The step of the checkpoint that was begun, if `finish` was not called since."""
        return None if self._pending is None else self._pending.step

    @property
    def written(self) -> bool:
        """Whether this rank's part of it is on disk, or cannot be written."""
        return self._pending is not None and self._pending.work.done()

    def finish(self) -> Saved | None:
        """Waits until every rank has written its part, and puts the checkpoint in its place. None: there was none.

        Raises:
            OSError: some rank could not write, on all ranks alike. Earlier checkpoints are untouched.
        """
        if (pending := self._pending) is None:
            return None
        self._pending = None
        waited = time.perf_counter()
        final = pending.partial.with_name(pending.partial.name.removesuffix(checkpoint.PARTIAL))
        size = 0

        def publish() -> str | None:
            if self.ranks.rank == 0:
                entries = {name: entry for part in parts for name, entry in part.items()}
                checkpoint.publish(pending.partial, final, pending.step, entries)
                before = self._deleted.exception()  # it came before this checkpoint in the thread: it is done
                self._deleted = self._run(_delete, checkpoint.retire(self.run_dir, self.keep))
                return None if before is None else str(before)
            return None

        try:
            parts = checkpoint.together(pending.work.result, self.ranks)
            size = sum(entry.bytes for part in parts for entry in part.values())
            undeleted, *_ = checkpoint.together(publish, self.ranks)
        except OSError:
            self._discard(pending.partial)
            raise
        now = time.perf_counter()
        return Saved(pending.step, final, pending.stall + now - waited, now - pending.began, size, undeleted)

    def close(self) -> None:
        """Without a `finish` before it, what is being written is left half-written, as a crash would leave it; and what
        could not be deleted stays, until the next start of the run."""
        self._deleted.exception()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, function: Callable[..., Any], *args: Any) -> Future:
        """In the thread, one after another; or at once, if not asynchronous."""
        if self.asynchronous:
            return self._pool.submit(function, *args)
        done: Future = Future()
        try:
            done.set_result(function(*args))
        except OSError as error:
            done.set_exception(error)
        return done

    def _discard(self, partial: Path) -> None:
        if self.ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _write(partial: Path, files: list[tuple[Any, Path]], trainer: str | None) -> dict[str, manifest.Entry]:
    """This rank's files and their manifest entries. Files without a value are there already."""
    paths = [path for _, path in files]
    try:
        while files:
            value, path = files.pop(0)  # so that its memory is free for the next
            if value is not None:
                torch.save(value, path)
            del value
    except RuntimeError as error:  # torch's zip writer has no other error for a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    if trainer is not None:
        (partial / "trainer.json").write_text(trainer, encoding="utf-8")
        paths.append(partial / "trainer.json")
    return {path.relative_to(partial).as_posix(): checkpoint.sync_and_measure(path) for path in paths}


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(FileNotFoundError):  # a rollback deletes leftovers too
            shutil.rmtree(folder)
