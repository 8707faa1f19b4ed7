"""What a run's folder tells about the run. Importing this imports nothing heavy."""

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riverrun.train import outcome
from riverrun.train.outcome import Standing

if TYPE_CHECKING:
    from riverrun.train.config import Recipe

TAIL = 2**16  # bytes: more than any record of metrics.jsonl takes
BEAT_FIELDS: dict[str, Any] = {"rank": int, "host": str, "pid": int, "step": int, "phase": str, "time": (int, float)}


def require(run_dir: Path) -> None:
    """
    Raises:
        ValueError: this is not the folder of a run.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: give the --run-dir that the run was started with")
    if not any((run_dir / name).exists() for name in ("outcome.json", "config.toml", "checkpoints", "slurm")):
        raise ValueError(f"{run_dir} holds no run: give the --run-dir that a run was started with")


def claim(run_dir: Path, recipe: "Recipe") -> None:
    """Makes a folder that of a recipe's run, ahead of training: what would refuse to start in hours is refused now.

    Raises:
        ValueError: it has other things in it, or a run of another recipe.
    """
    from riverrun.train import resume
    from riverrun.train.recipe import difference, load_recipe, to_toml

    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"--run-dir {run_dir} is a file: name a folder")
    config = run_dir / "config.toml"
    if config.exists():
        different = difference(load_recipe(str(config)).recipe, recipe, ignore=resume.MAY_CHANGE)
        if different:
            lines = "\n".join(f"  - {line}" for line in different)
            raise ValueError(
                f"{run_dir} belongs to a run of another recipe:\n{lines}\nuse another --run-dir, or the values it was "
                "started with"
            )
        return
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(f"--run-dir {run_dir} is not empty and holds no run: name a new folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    config.write_text(to_toml(recipe), encoding="utf-8")


def newest_step(run_dir: Path) -> int:
    """The step of the newest finished checkpoint; -1: there is none. Whether it is intact is not looked at."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name, re.ASCII)), default=-1)


def last_record(run_dir: Path, kind: str = "train") -> Mapping[str, Any]:
    """The last whole record of that kind near the end of metrics.jsonl; empty if there is none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is not whole
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == kind:
            return record
    return {}


def record_time(run_dir: Path) -> float | None:
    """When metrics.jsonl was last written to, in seconds since 1970."""
    try:
        return (run_dir / "metrics.jsonl").stat().st_mtime
    except OSError:
        return None


def heartbeats(run_dir: Path) -> list[dict[str, Any]]:
    """The ranks' last signs of life, by rank; those that cannot be read are left out."""
    beats = []
    for path in sorted((run_dir / "heartbeats").glob("rank_*.json")):
        try:
            beat = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(beat, dict) and all(isinstance(beat.get(key), kind) for key, kind in BEAT_FIELDS.items()):
            beats.append(beat)
    return sorted(beats, key=lambda beat: beat["rank"])


def dead(standing: Standing) -> bool:
    """Whether the run says that it is running on this host, and its process is gone."""
    return standing.state == "running" and standing.host == socket.gethostname() and not _exists(standing.pid)


def running_here(run_dir: Path) -> int:
    """The process of this host that runs in the folder, or 0."""
    standing = outcome.read(run_dir)
    here = standing is not None and standing.state == "running" and standing.host == socket.gethostname()
    return standing.pid if standing is not None and here and _exists(standing.pid) else 0


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
