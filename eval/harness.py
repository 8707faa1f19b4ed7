"""Results as files: a superset of the fields of lm-evaluation-harness's results JSON, so that its readers read ours."""

import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from riverrun import __version__
from riverrun.eval.fitting import Auto
from riverrun.eval.intervals import Z95
from riverrun.eval.models import LoadedModel
from riverrun.eval.ranks import running
from riverrun.train.data.store import write_atomically

RESULTS, SCHEMA_VERSION = "results.json", 1

Interval = tuple[float, float]


@dataclass(frozen=True)
class SampleMetric:
    """How a metric is computed from samples.jsonl, so that two models can be compared sample by sample:
    scale · Σ value / Σ weight, or the exponential of that.

    Attributes:
        value, weight: fields of a sample; without `weight`, the mean of the values.
        where: fields that the samples of this metric have, with their values; none: all samples.
    """

    value: str
    weight: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    exponential: bool = False


@dataclass(frozen=True)
class TaskResult:
    """What a task reports.

    Attributes:
        version: of the task's definition; numbers of different versions do not compare.
        metrics: by name; None where undefined.
        stderr: of those metrics that have one.
        higher_is_better: by name of the metric.
        documents: evaluated; available: before any limit.
        config: what defines the numbers besides the model.
        details: anything else, as JSON types.
        ci95: intervals of 95% of metrics. Without one here, it is `NAME_95` in the details, or else the normal one of
            the standard error.
        sample_metrics: those that the samples give.
    """

    task: str
    version: int
    metrics: dict[str, float | None]
    stderr: dict[str, float | None]
    higher_is_better: dict[str, bool]
    documents: int
    available: int
    config: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    ci95: dict[str, Interval | None] = field(default_factory=dict)
    sample_metrics: dict[str, SampleMetric] = field(default_factory=dict)

    def interval(self, metric: str) -> Interval | None:
        value, stderr = self.metrics[metric], self.stderr.get(metric)
        if (given := self.ci95.get(metric) or self.details.get(f"{metric}_95")) is not None:
            return given[0], given[1]
        return None if value is None or stderr is None else (value - Z95 * stderr, value + Z95 * stderr)


class Timer:
    """Wall-clock and calendar time since it was made."""

    def __init__(self) -> None:
        self.date, self._start = time.time(), time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


class ReportedElsewhere(Exception):
    """On all ranks but the first, what comes after the results: their work is done, and the first one reports."""


@dataclass(frozen=True)
class Recording:
    """Path and contents of each results.json that `command` wrote."""

    command: str | None = None
    written: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(command: str) -> Iterator[list[tuple[Path, dict[str, Any]]]]:
    """The list that `write_results` adds to within; the command is put into the results."""
    current = Recording(command)
    token = _recording.set(current)
    try:
        yield current.written
    finally:
        _recording.reset(token)


def write_results(
    folder: Path,
    results: list[TaskResult],
    model: LoadedModel,
    *,
    seed: int,
    batch_size: int,
    timer: Timer,
    limit: int | None = None,
) -> Path:
    """Write `folder`/results.json atomically and return its path. NaN and infinity, which JSON lacks, become null and
    are named under `non_finite`.

    Raises:
        ReportedElsewhere: on all ranks but the first.
    """
    if running().rank:
        raise ReportedElsewhere
    current = _recording.get() or Recording()
    document = describe(results, model, seed=seed, batch_size=batch_size, timer=timer, limit=limit)
    path = write_document(folder, document | {"command": current.command})
    current.written.append((path, json.loads(path.read_text(encoding="utf-8"))))
    return path


def write_document(folder: Path, document: dict[str, Any]) -> Path:
    """Results as `folder`/results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path, bad = folder / RESULTS, list[str]()
    document = _finite(document, (), bad)
    if bad:
        document["non_finite"] = bad
    write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    return path


def describe(
    results: list[TaskResult],
    model: LoadedModel,
    *,
    seed: int,
    batch_size: int,
    timer: Timer,
    limit: int | None = None,
) -> dict[str, Any]:
    """The contents of results.json. Metrics are named `NAME,none` as there (the filter "none")."""
    tokenizer = model.tokenizer
    return {
        "schema_version": SCHEMA_VERSION,
        "results": {r.task: _metrics(r) for r in results},
        "ci95": {r.task: {name: _list(r.interval(name)) for name in r.metrics} for r in results},
        "group_subtasks": {r.task: [] for r in results},
        "configs": {r.task: {"task": r.task, **r.config} for r in results},
        "versions": {r.task: r.version for r in results},
        "n-shot": {r.task: 0 for r in results},
        "higher_is_better": {r.task: r.higher_is_better for r in results},
        "n-samples": {r.task: {"original": r.available, "effective": r.documents} for r in results},
        "sample_metrics": {r.task: {name: asdict(m) for name, m in r.sample_metrics.items()} for r in results},
        "config": {
            "model": "riverrun" if model.is_riverrun else "hf",
            "model_args": model.description,
            "model_num_parameters": sum(p.numel() for p in model.model.parameters()),
            "model_dtype": str(model.dtype),
            "model_fingerprint": model.fingerprint,
            "model_sha": model.fingerprint,
            "model_step": model.step,
            "state_control": model.state_control,
            "num_steps": model.num_steps,
            "batch_size": "auto" if isinstance(batch_size, Auto) else batch_size,
            "device": str(model.device),
            "ranks": running().world_size,
            "limit": limit,
            "random_seed": seed,
            "numpy_seed": seed,
            "torch_seed": torch.initial_seed(),
        },
        **_git(),
        "date": timer.date,
        "environment": {
            "riverrun": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
            "numpy": np.__version__,
        },
        "transformers_version": transformers.__version__,
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer.fingerprint,
        "eot_token_id": None if tokenizer is None else tokenizer.eos_id,
        "max_length": model.seq_len,
        "model_source": "riverrun" if model.is_riverrun else "hf",
        "model_name": model.name,
        "start_time": timer.date,
        "end_time": timer.date + timer.seconds(),
        "total_evaluation_time_seconds": timer.seconds(),
        "details": {r.task: r.details for r in results},
    }


BY_TASK = (
    "results", "ci95", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples",
    "sample_metrics", "details",
)  # fmt: skip


def merge(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One results.json of those of several commands, by their names, all of one model. A task's name that two of them
    use is preceded by the command's. `merged` says which tasks came from where."""
    tasks = [task for document in documents.values() for task in document["results"]]
    names = {
        command: {task: task if tasks.count(task) == 1 else f"{command}/{task}" for task in document["results"]}
        for command, document in documents.items()
    }
    found = dict(next(iter(documents.values())))
    for part in BY_TASK:
        found[part] = {
            names[command][task]: value
            for command, document in documents.items()
            for task, value in document[part].items()
        }
    found["merged"] = {command: list(renamed.values()) for command, renamed in names.items()}
    found["start_time"] = found["date"] = min(document["start_time"] for document in documents.values())
    found["end_time"] = max(document["end_time"] for document in documents.values())
    found["total_evaluation_time_seconds"] = found["end_time"] - found["start_time"]
    bad = [f"{command}: {name}" for command, document in documents.items() for name in document.get("non_finite", ())]
    found.pop("non_finite", None)
    return found | ({"non_finite": bad} if bad else {})


def _metrics(result: TaskResult) -> dict[str, Any]:
    found: dict[str, Any] = {"alias": result.task}
    for name, value in result.metrics.items():
        found[f"{name},none"] = value
        found[f"{name}_stderr,none"] = result.stderr.get(name, "N/A")
    return found


def _list(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _finite(value: Any, place: tuple[str, ...], bad: list[str]) -> Any:
    """`value` with null for numbers that are not finite, whose places are added to `bad`."""
    if isinstance(value, dict):
        return {key: _finite(part, (*place, str(key)), bad) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, (*place, str(i)), bad) for i, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(" ".join(place))
        return None
    return value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """The commit of the checkout that runs and whether files in it were changed; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    commands = {"git_hash": ["rev-parse", "HEAD"], "git_dirty": ["status", "--porcelain", "--untracked-files=no"]}
    if not (root / ".git").exists():
        return dict.fromkeys(commands)
    try:
        said = {
            name: subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout
            for name, words in commands.items()
        }
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(commands)
    return {"git_hash": said["git_hash"].strip(), "git_dirty": bool(said["git_dirty"].strip())}
