"""Samples that are evaluated one after another into a file, which a killed evaluation goes on with.

Several ranks share the samples. Each appends to a file of its own, samples.RANK.jsonl; at the end, the first one puts
all of them into samples.jsonl. Whoever goes on after a kill, as any number of ranks, finds both kinds of files. They
must see the same folder.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from pathlib import Path
from typing import Any

from riverrun.eval.fitting import Fitting, in_batches
from riverrun.eval.lines import whole_lines
from riverrun.eval.ranks import running
from riverrun.train.data.store import write_atomically

SAMPLES, SETTINGS = "samples.jsonl", "samples_config.json"

Key = tuple[Any, ...]
"""What names a sample within its task: JSON scalars."""

_overwriting: ContextVar[bool] = ContextVar("overwriting", default=False)


@contextmanager
def overwriting() -> Iterator[None]:
    """Within, samples that are there already are removed rather than gone on with."""
    token = _overwriting.set(True)
    try:
        yield
    finally:
        _overwriting.reset(token)


def collect(
    folder: Path,
    config: dict[str, Any],
    keys: Sequence[Key],
    work: Callable[[list[Key]], list[dict[str, Any]]],
    *,
    batch_size: int,
    group: Callable[[Key], Any] = lambda key: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """The records of `keys`, in their order: those in `folder`, and the rest, each batch of which is appended there as
    soon as it is finished. Several ranks share the rest; each returns all.

    Args:
        config: all that the records depend on besides their keys, as JSON types; kept beside them.
        work: keys → their records, as JSON types; without effects, for it is called again when the memory is too small.
        batch_size: keys that `work` is given, at most, `Auto` or fixed; neighbours with the same `group`.
        progress: told of records done and of all; with several ranks, as if each had got as far as this one.

    Raises:
        ValueError: the folder holds samples of another configuration, or damaged ones; a batch that the memory does not
            take.
    """
    Fitting(batch_size)  # a wrong size is told before the folder is touched
    ranks = running()
    found: dict[Key, dict[str, Any]] = ranks.first(lambda: resume(folder, config))
    missing = [key for key in keys if key not in found]
    share = missing[ranks.rank :: ranks.world_size]
    own: dict[Key, dict[str, Any]] = {}
    progress(len(keys) - len(missing), len(keys))
    path = folder / (SAMPLES if ranks.world_size == 1 else f"samples.{ranks.rank}.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        for _, some in groupby(share, group):
            for part, records in in_batches(list(some), batch_size, work):
                new = dict(zip(part, records, strict=True))
                file.writelines(_line(key, record) for key, record in new.items())
                file.flush()
                own |= new
                progress(len(keys) - max(0, len(missing) - ranks.world_size * len(own)), len(keys))
    for records in ranks.gather(own):
        found |= records
    ranks.first(lambda: _put_in_order(folder, keys, found))
    return [found[key] for key in keys]


def resume(folder: Path, config: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The records finished there, or none in a fresh folder, which is marked as this configuration's. Files of ranks
    are put into samples.jsonl; a line that was cut short when a run was killed is removed.

    Raises:
        ValueError: see `collect`.
    """
    config = json.loads(json.dumps(config))
    folder.mkdir(parents=True, exist_ok=True)
    samples, mark = folder / SAMPLES, folder / SETTINGS
    if _overwriting.get():
        for path in (samples, *_files_of_ranks(folder)):
            path.unlink(missing_ok=True)
    files = [path for path in (samples, *_files_of_ranks(folder)) if path.exists()]
    if not files:
        write_atomically(mark, (json.dumps(config, indent=2) + "\n").encode())
        samples.touch()
        return {}
    there = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
    if different := sorted(key for key in config.keys() | there.keys() if config.get(key) != there.get(key)):
        raise ValueError(
            f"{samples} is of another configuration ({', '.join(different)} differ): choose another --out, or start "
            "again with `riverrun eval --overwrite …`"
        )
    found: dict[Key, dict[str, Any]] = {}
    for path in files:
        try:
            found |= read(path)
        except (TypeError, AttributeError, KeyError, json.JSONDecodeError):
            raise ValueError(f"{path} is damaged: remove it to start again") from None
    if files != [samples]:
        _write(folder, found)
    return found


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """The records of a file of samples; its last line may be cut short."""
    records = [json.loads(line) for line in whole_lines(path)]
    return {tuple(record.pop("key")): record for record in records}


def _put_in_order(folder: Path, keys: Sequence[Key], found: dict[Key, dict[str, Any]]) -> None:
    """As one rank would have written them; others that were there come last."""
    asked = set(keys)
    ordered = {key: found[key] for key in keys} | {key: found[key] for key in found if key not in asked}
    if list(ordered) != list(found) or _files_of_ranks(folder):
        _write(folder, ordered)


def _write(folder: Path, records: dict[Key, dict[str, Any]]) -> None:
    write_atomically(folder / SAMPLES, "".join(_line(key, record) for key, record in records.items()).encode())
    for path in _files_of_ranks(folder):
        path.unlink()


def _line(key: Key, record: dict[str, Any]) -> str:
    return json.dumps({"key": key, **record}) + "\n"


def _files_of_ranks(folder: Path) -> list[Path]:
    return sorted(folder.glob("samples.*.jsonl"))
