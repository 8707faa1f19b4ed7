"""Samples that are evaluated one after another into a file, which a killed evaluation goes on with."""

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from riverrun.eval.batches import batched
from riverrun.eval.lines import whole_lines
from riverrun.train.data.store import write_atomically

SAMPLES, SETTINGS = "samples.jsonl", "samples_config.json"

Key = tuple[Any, ...]
"""What names a sample within its task: JSON scalars."""


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
    """The records of `keys`, in their order: those in `folder`/samples.jsonl, and the rest, each batch of which is
    appended there as soon as it is finished.

    Args:
        config: all that the records depend on besides their keys, as JSON types; kept beside them.
        work: keys → their records, as JSON types.
        batch_size: keys that `work` is given, at most; neighbours with the same `group`.
        progress: told of records done and of all.

    Raises:
        ValueError: the folder holds samples of another configuration, or damaged ones.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    found = resume(folder, config)
    progress(len(found), len(keys))
    with open(folder / SAMPLES, "a", encoding="utf-8") as file:
        for _, some in groupby((key for key in keys if key not in found), group):
            for part in batched(some, batch_size):
                for key, record in zip(part, work(part)):
                    file.write(json.dumps({"key": key, **record}) + "\n")
                    found[key] = record
                file.flush()
                progress(len(found), len(keys))
    return [found[key] for key in keys]


def resume(folder: Path, config: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The records finished there, or none in a fresh folder, which is marked as this configuration's. A line that was
    cut short when a run was killed is removed.

    Raises:
        ValueError: see `collect`.
    """
    config = json.loads(json.dumps(config))
    folder.mkdir(parents=True, exist_ok=True)
    samples, mark = folder / SAMPLES, folder / SETTINGS
    if not samples.exists():
        write_atomically(mark, (json.dumps(config, indent=2) + "\n").encode())
        samples.touch()
        return {}
    there = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
    if different := sorted(key for key in config.keys() | there.keys() if config.get(key) != there.get(key)):
        raise ValueError(
            f"{samples} is of another configuration ({', '.join(different)} differ): choose another --out, or remove "
            "it to start again"
        )
    try:
        records = [json.loads(line) for line in whole_lines(samples)]
        return {tuple(record.pop("key")): record for record in records}
    except (TypeError, AttributeError, KeyError, json.JSONDecodeError):
        raise ValueError(f"{samples} is damaged: remove it to start again") from None
