"""What is measured during training, and the files it goes to."""

import errno
import json
import math
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from riverrun.kernels.common.shooting import SolveStatistics, take_statistics
from riverrun.modeling.statistics import take_noted
from riverrun.train.config import LogConfig

# dense bf16 peak of one device in FLOP/s, from the makers' data sheets; the first name that fits counts
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(config: LogConfig, device: torch.device, dtype: str) -> float | None:
    """FLOP/s that one device could do, from `log.peak_tflops` or its name; None where neither is known."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory so far: allocated by torch on CUDA, resident in the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that does not depend on the tokenizer."""
    return nats_per_token / math.log(2) / bytes_per_token


@dataclass
class Window:
    """Sums over the steps since the last record. It is in checkpoints, so that records do not depend on resumes."""

    losses: dict[str, list[float]] = field(default_factory=dict)  # of the objective: sum and count of each
    skipped: int = 0
    solves: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the nonlinear recurrences, by op
    memories: dict[str, list[float]] = field(default_factory=dict)  # and recurrent depth: sum and count of each
    iterations: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # micro batches; sums of n and k; most n + k

    def add(self, losses: dict[str, tuple[float, float]], skipped: bool) -> None:
        """One step; the losses of a skipped one say nothing and are left out."""
        self.skipped += skipped
        if not skipped:
            self.losses = merge_sums(self.losses, {name: list(found) for name, found in losses.items()})

    def add_solves(self) -> None:
        """What the solvers counted since the last call."""
        taken = {op: vars(statistics) for op, statistics in take_statistics().items()}
        self.solves = merge_solves(self.solves, taken)

    def add_memories(self) -> None:
        """What neural memories and recurrent depth noted since the last call."""
        self.memories = merge_sums(self.memories, take_noted())

    def add_iterations(self, num_steps: Sequence[tuple[int, int]]) -> None:
        """Those of a step's micro batches, without gradient and with it."""
        count, without, graded, most = self.iterations
        without, graded = without + sum(n for n, _ in num_steps), graded + sum(k for _, k in num_steps)
        self.iterations = [count + len(num_steps), without, graded, max([most, *map(sum, num_steps)])]

    @property
    def mean_iterations(self) -> tuple[float, float] | None:
        """Without gradient and with it, of a micro batch; None: the model's depth is fixed."""
        count, without, graded, _ = self.iterations
        return (without / count, graded / count) if count else None

    def means(self) -> dict[str, float | None]:
        """Nats per prediction of each loss; None where nothing counted."""
        return {name: value / count if count else None for name, (value, count) in self.losses.items()}


def merge_sums(*parts: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of each name the sum of sums, and of counts."""
    merged: dict[str, list[float]] = {}
    for part in parts:
        for name, found in part.items():
            merged[name] = [a + b for a, b in zip(merged.get(name, (0.0, 0.0)), found)]
    return merged


def memory_metrics(memories: dict[str, list[float]]) -> dict[str, float]:
    """Means; see `riverrun.modeling.memory_statistics` and `riverrun.modeling.depth.statistics`."""
    return {name: value / count for name, (value, count) in memories.items() if count}


def depth_metrics(window: Window) -> dict[str, float]:
    """Mean and largest number of iterations, if the model's depth is recurrent."""
    if (mean := window.mean_iterations) is None:
        return {}
    return {"depth_mean": sum(mean), "depth_max": window.iterations[-1]}


def merge_solves(*parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sum of some windows' `solves`."""
    merged: dict[str, SolveStatistics] = {}
    for part in parts:
        for op, values in part.items():
            merged[op] = merged.get(op, SolveStatistics()) + SolveStatistics(**values)
    return {op: vars(statistics) for op, statistics in merged.items()}


def solver_metrics(solves: dict[str, dict[str, Any]]) -> dict[str, float]:
    """For each nonlinear recurrence that was solved in parallel over time: the most passes that a solve took, the
    largest change that the last pass of a converged one would have made, and the share that had to be finished step by
    step."""
    found: dict[str, float] = {}
    for op, values in solves.items():
        statistics = SolveStatistics(**values)
        if statistics.pieces:
            found[f"{op}_passes"] = statistics.passes
            found[f"{op}_change"] = statistics.change
            found[f"{op}_fallbacks"] = statistics.fallbacks / statistics.pieces
    return found


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, with `kind` ("train" or "held_out") and `step`.

    Records beyond `step`, and a last line that a crash cut short, are dropped on opening: after a resume no step
    appears twice.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            kept = "".join(json.dumps(record) + "\n" for record in read(path) if record["step"] <= step)
            fresh = path.with_suffix(".partial")
            fresh.write_text(kept, encoding="utf-8")
            os.replace(fresh, path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, record: dict[str, Any]) -> None:
        """
        Raises:
            OSError: the record could not be written; nothing of it stays in the file.
        """
        line, end = (json.dumps(record) + "\n").encode(), os.fstat(self._file).st_size
        if os.write(self._file, line) < len(line):  # a full disk takes what fits
            os.ftruncate(self._file, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a metrics file."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


class Dashboards:
    """TensorBoard, and Weights & Biases if asked for.

    Raises:
        ValueError: wandb was asked for and is not installed.
    """

    def __init__(self, config: LogConfig, run_dir: Path, settings: dict[str, Any], step: int):
        self._tensorboard = self._wandb = None
        if config.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("log.wandb=true needs wandb: pip install 'riverrun[wandb]'") from None
            self._wandb = wandb.init(
                dir=str(run_dir),
                name=run_dir.name,
                id=run_dir.name,
                project="riverrun",
                resume="allow",
                config=settings,
            )
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        step, kind = record["step"], record["kind"]
        values = {f"{kind}/{k}": v for k, v in record.items() if k not in ("step", "kind") and v is not None}
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
