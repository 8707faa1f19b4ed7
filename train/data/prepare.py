"""From documents to token stores: parallel, resumable, the same bytes for any number of workers or interruptions.

    OUT/train/       the store to train on            OUT/tokenizer/     as a Hugging Face folder
    OUT/held_out/    documents kept apart (if asked)  OUT/prepare.json   the options, the input and the counts

While it runs, OUT/.work/ holds plan.json, and NNNNN.json for each piece of the input whose shards are complete. The
stores' indexes are written at the very end: before that, no folder looks like a store.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from riverrun.train.data.sources import Skipped, Source, open_source, position
from riverrun.train.data.store import TokenStore, token_dtype, write_atomically, write_index, write_shard
from riverrun.train.data.tokenizer import Tokenizer, load_tokenizer

VERSION = 1
REPORT, WORK, PLAN = "prepare.json", ".work", "plan.json"
TRAIN, HELD_OUT = "train", "held_out"
SHOWN_SKIPS = 5


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote.

    Attributes:
        counts: for each store, its documents, tokens and bytes.
        skipped: documents left out, by reason.
        examples: where a few of them are; empty ones are only counted.
    """

    out: Path
    counts: dict[str, dict[str, int]]
    skipped: dict[str, int]
    examples: list[str]

    @property
    def train(self) -> Path:
        return self.out / TRAIN

    @property
    def held_out(self) -> Path | None:
        return self.out / HELD_OUT if HELD_OUT in self.counts else None

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"


def prepare(
    inputs: Sequence[str | Path],
    out: Path | str,
    *,
    tokenizer: str | Path | Tokenizer,
    format: str = "auto",
    field: str = "text",
    glob: str = "*",
    subset: str | None = None,
    split: str = "train",
    held_out: float = 0.0,
    seed: int = 0,
    workers: int = 1,
    piece_bytes: int | None = None,
    console: Console | None = None,
) -> Prepared:
    """Tokenise a corpus into `out`. Called again after an interruption, it goes on; after the end, it changes nothing.

    Args:
        inputs, format, field, glob, subset, split, piece_bytes: see `sources.open_source`.
        tokenizer: see `load_tokenizer`.
        held_out: the share of documents that goes into the second store: those whose SHA-256 together with the seed is
            small, so that copies of a document stay on one side.
        workers: processes.
        console: shows a progress bar if it is a terminal.

    Raises:
        ValueError: whatever the user has to mend; among others an `out` begun with other options or another input, and
            a full disk.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"the held-out share must be at least 0 and below 1, not {held_out}")
    if workers < 1:
        raise ValueError(f"at least one worker is needed, not {workers}")
    out = Path(out)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    try:
        with _locked(out) as work:
            source = open_source(
                inputs, format=format, field=field, glob=glob, subset=subset, split=split, cache=work / "cache",
                piece_bytes=piece_bytes,
            )  # fmt: skip
            plan = {
                "version": VERSION,
                "tokenizer": _describe(tokenizer),
                "held_out": held_out,
                "seed": seed,
                "pieces": len(source.sizes),
                "input": source.identity,
            }
            if (out / REPORT).exists():
                finished = _read_json(out / REPORT, "plan", "counts", "skipped", "examples")
                with _ours(out / REPORT):
                    _check_same_plan(out, plan, finished["plan"])
                    for name in set(finished["counts"]) & {TRAIN, HELD_OUT}:
                        TokenStore.open(out / name)
            else:
                _begin(out, plan)
                writer = PieceWriter(source, tokenizer, out, held_out, seed)
                _run(writer, len(source.sizes), workers, console)
                finished = _finish(out, plan, tokenizer)
            shutil.rmtree(work)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"the disk is full: {out} is incomplete. Free some space and give the same command again to go on"
            ) from error
        raise
    return Prepared(out, finished["counts"], finished["skipped"], finished["examples"])


@dataclass(frozen=True)
class PieceWriter:
    """Turns a piece of the input into shards, and records that they are complete. Sent to worker processes."""

    source: Source
    tokenizer: Tokenizer
    out: Path
    held_out: float
    seed: int

    def record_path(self, piece: int) -> Path:
        return self.out / WORK / f"{piece:05d}.json"

    def is_done(self, piece: int) -> bool:
        """The record is there and so are the shards, in full."""
        path = self.record_path(piece)
        if not path.is_file():
            return False
        width = token_dtype(self.tokenizer.vocab_size).itemsize
        with _ours(path):
            for store, entry in _read_json(path, "shards")["shards"].items():
                for kind, size in (("tokens", entry["tokens"] * width), ("docs", entry["documents"] * 16)):
                    shard = self.out / store / f"{entry['name']}.{kind}"
                    if not shard.is_file() or shard.stat().st_size != size:
                        return False
        return True

    def write(self, piece: int) -> None:
        skipped: list[Skipped] = []
        kept_apart: list[tuple[np.ndarray, int]] = []
        name, dtype = f"{piece:05d}", token_dtype(self.tokenizer.vocab_size)
        shards = {TRAIN: write_shard(self.out / TRAIN, name, self._train_documents(piece, kept_apart, skipped), dtype)}
        if self.held_out:
            shards[HELD_OUT] = write_shard(self.out / HELD_OUT, name, kept_apart, dtype)
        record = {
            "shards": shards,
            "skipped": dict(Counter(s.reason for s in skipped)),
            "examples": [f"{s.where}: {s.reason}" for s in skipped if s.reason != "empty"][:SHOWN_SKIPS],
        }
        write_atomically(self.record_path(piece), json.dumps(record).encode())

    def _train_documents(
        self, piece: int, kept_apart: list[tuple[np.ndarray, int]], skipped: list[Skipped]
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the documents to train on and collects the others."""
        for text in self.source.documents(piece):
            if isinstance(text, Skipped):
                skipped.append(text)
                continue
            data = text.encode()
            tokens = np.array([*self.tokenizer.encode(text), self.tokenizer.eos_id], np.int64)
            assert tokens.min() >= 0 and tokens.max() < self.tokenizer.vocab_size
            if self.held_out and position(data, self.seed) < self.held_out:
                kept_apart.append((tokens.astype(np.uint32), len(data)))
            else:
                yield tokens, len(data)


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """OUT/.work, held by this process alone."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another output folder")
    if out.is_dir() and any(out.iterdir()) and not (out / REPORT).exists() and not (out / WORK).exists():
        raise ValueError(f"{out} is not empty, and was not written by `riverrun data prepare`: choose another folder")
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is preparing {out}: wait for it, or choose another folder") from None
        try:
            yield work
        except BaseException:
            if not (work / PLAN).exists():  # nothing was begun: leave no trace
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    out.rmdir()
            raise


def _begin(out: Path, plan: dict[str, Any]) -> None:
    if (out / WORK / PLAN).exists():
        with _ours(out / WORK / PLAN):
            _check_same_plan(out, plan, _read_json(out / WORK / PLAN, *plan))
    if not plan["pieces"]:
        raise ValueError("the input holds no documents")
    write_atomically(out / WORK / PLAN, json.dumps(plan).encode())  # first: what is here is ours from now on
    for name in (TRAIN, HELD_OUT) if plan["held_out"] else (TRAIN,):
        (out / name).mkdir(exist_ok=True)


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """A file of our own, with these keys."""
    with _ours(path):
        try:
            value = json.loads(path.read_bytes())
        except ValueError:
            raise TypeError("no JSON") from None
        for key in keys:
            value[key]
    return value


@contextmanager
def _ours(path: Path) -> Iterator[None]:
    """What a file of our own does not hold as we wrote it, somebody or something else changed.

    Raises:
        ValueError: then.
    """
    try:
        yield
    except (TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: remove {path.parent} and start again") from None


def _check_same_plan(out: Path, plan: dict[str, Any], begun: dict[str, Any]) -> None:
    now, before = (
        {**p, **{f"input {k}": v for k, v in p["input"].items()}, "tokenizer": p["tokenizer"]["fingerprint"][:12]}
        for p in (plan, begun)
    )
    differing = [k for k in {**before, **now} if k not in ("input", "pieces") and now.get(k) != before.get(k)]
    changes = [
        "the input files changed" if key == "input data" else f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in differing
    ]
    if not changes and plan["pieces"] != begun["pieces"]:
        changes = [f"the input is cut into {plan['pieces']} pieces instead of {begun['pieces']}"]
    if changes:
        raise ValueError(
            f"{out} was begun with another input or other options ({'; '.join(changes)}): give the same again to go "
            "on, choose another folder, or remove this one"
        )


_writer: PieceWriter | None = None  # in worker processes


def _start_worker(writer: PieceWriter) -> None:
    global _writer
    _writer = writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()  # a killed parent cannot stop its workers
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write_in_worker(piece: int) -> int:
    assert _writer is not None
    _writer.write(piece)
    return piece


def _run(writer: PieceWriter, pieces: int, workers: int, console: Console | None) -> None:
    """Write all pieces that are not done yet."""
    missing = [piece for piece in range(pieces) if not writer.is_done(piece)]
    sizes = writer.source.sizes
    done = sum(sizes) - sum(sizes[piece] for piece in missing)
    bar = Progress(
        TextColumn("tokenising"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, disable=console is None or not console.is_terminal, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=sum(sizes), completed=done)
        for piece in _write_all(writer, missing, min(workers, len(missing))):
            bar.advance(task, sizes[piece])


def _write_all(writer: PieceWriter, pieces: list[int], workers: int) -> Iterator[int]:
    """Yields each piece when it is written."""
    if workers <= 1:
        for piece in pieces:
            writer.write(piece)
            yield piece
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of libraries in an unknown state
    pool = ProcessPoolExecutor(workers, context, _start_worker, (writer,))
    try:
        for future in as_completed([pool.submit(_write_in_worker, piece) for piece in pieces]):
            yield future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died (out of memory?): give the same command again to go on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(out: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the tokenizer, the report and, last, the indexes."""
    records = [_read_json(out / WORK / f"{piece:05d}.json", "shards") for piece in range(plan["pieces"])]
    shards = {name: [record["shards"][name] for record in records] for name in records[0]["shards"]}
    counts = {
        name: {kind: sum(shard[kind] for shard in entries) for kind in ("documents", "tokens", "bytes")}
        for name, entries in shards.items()
    }
    skipped = sum((Counter(record["skipped"]) for record in records), Counter())
    examples = [example for record in records for example in record["examples"]][:SHOWN_SKIPS]
    for name, count in counts.items():
        if not count["documents"]:
            left_out = "".join(f"; {number} {reason}" for reason, number in sorted(skipped.items()))
            why = "the input holds no usable documents" + left_out
            if name == HELD_OUT or counts.get(HELD_OUT, {}).get("documents"):
                why = f"no document fell into {name}: choose another --held-out share or another --seed"
            shutil.rmtree(out / TRAIN)  # these options lead nowhere: let others begin in this folder
            shutil.rmtree(out / HELD_OUT, ignore_errors=True)
            shutil.rmtree(out / WORK)
            raise ValueError(f"{why}{''.join(f'{chr(10)}  - {example}' for example in examples)}")
    tokenizer.save(out / "tokenizer")
    for name, entries in shards.items():
        write_index(out / name, entries, tokenizer=plan["tokenizer"])
    report = {"plan": plan, "counts": counts, "skipped": dict(sorted(skipped.items())), "examples": examples}
    write_atomically(out / REPORT, json.dumps(report, indent=1).encode())
    return report
