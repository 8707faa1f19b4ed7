"""Results as files: a superset of the fields of lm-evaluation-harness's results JSON, so that its readers read ours."""

import json
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from riverrun import __version__
from riverrun.eval.models import LoadedModel
from riverrun.train.data.store import write_atomically

RESULTS = "results.json"


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


class Timer:
    """Wall-clock and calendar time since it was made."""

    def __init__(self) -> None:
        self.date, self._start = time.time(), time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


def write_results(
    folder: Path, results: list[TaskResult], model: LoadedModel, *, seed: int, batch_size: int, timer: Timer
) -> Path:
    """Write `folder`/results.json atomically and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    document = describe(results, model, seed=seed, batch_size=batch_size, timer=timer)
    write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    return path


def describe(
    results: list[TaskResult], model: LoadedModel, *, seed: int, batch_size: int, timer: Timer
) -> dict[str, Any]:
    """The contents of results.json. Metrics are named `NAME,none` as there (the filter "none")."""
    return {
        "results": {r.task: _metrics(r) for r in results},
        "group_subtasks": {r.task: [] for r in results},
        "configs": {r.task: {"task": r.task, **r.config} for r in results},
        "versions": {r.task: r.version for r in results},
        "n-shot": {r.task: 0 for r in results},
        "higher_is_better": {r.task: r.higher_is_better for r in results},
        "n-samples": {r.task: {"original": r.available, "effective": r.documents} for r in results},
        "config": {
            "model": "riverrun" if model.is_riverrun else "hf",
            "model_args": model.description,
            "model_num_parameters": sum(p.numel() for p in model.model.parameters()),
            "model_dtype": str(model.dtype),
            "model_fingerprint": model.fingerprint,
            "batch_size": batch_size,
            "device": str(model.device),
            "random_seed": seed,
        },
        "git_hash": _git_hash(),
        "date": timer.date,
        "environment": {
            "riverrun": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
            "numpy": np.__version__,
        },
        "transformers_version": transformers.__version__,
        "tokenizer_fingerprint": None if model.tokenizer is None else model.tokenizer.fingerprint,
        "model_source": "riverrun" if model.is_riverrun else "hf",
        "model_name": model.name,
        "total_evaluation_time_seconds": timer.seconds(),
        "details": {r.task: r.details for r in results},
    }


def _metrics(result: TaskResult) -> dict[str, Any]:
    found: dict[str, Any] = {"alias": result.task}
    for name, value in result.metrics.items():
        found[f"{name},none"] = value
        found[f"{name}_stderr,none"] = result.stderr.get(name, "N/A")
    return found


def _git_hash() -> str | None:
    """The commit of the checkout that runs; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
