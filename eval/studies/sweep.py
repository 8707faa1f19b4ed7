"""A study: one task, several mixers, learning rates and seeds. Finished runs are kept and never trained again."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from riverrun.eval.lines import whole_lines
from riverrun.eval.studies.fit import Progress
from riverrun.eval.studies.run import VERSION, Result, Run, given
from riverrun.eval.studies.side_by_side import train_side_by_side
from riverrun.eval.studies.trainer import train
from riverrun.train.data.store import write_atomically

STUDY, RUNS = "study.json", "runs.jsonl"


@dataclass(frozen=True)
class Study:
    """What is compared, and under which conditions; the fields are those of `Run`."""

    task: str
    mixers: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    layers: int
    width: int
    steps: int
    batch_size: int
    train_length: int
    test_lengths: tuple[int, ...]
    validate_every: int
    held_out_rows: int
    task_options: dict[str, Any] = field(default_factory=dict)
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    universal: dict[str, Any] | None = None
    patience: int = 3
    version: int = VERSION

    def runs(self) -> list[Run]:
        """Every run, a mixer after the other.

        Raises:
            ValueError: anything that makes a run impossible.
        """
        for name in ("mixers", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} {list(values)}: name at least one, and each only once")
        shared = {
            name: getattr(self, name)
            for name in (
                "task", "layers", "width", "steps", "batch_size", "train_length", "test_lengths", "validate_every",
                "held_out_rows", "task_options", "universal", "patience", "version",
            )
        }  # fmt: skip
        found = [
            Run(mixer=mixer, learning_rate=rate, seed=seed, mixer_options=self.mixer_options.get(mixer, {}), **shared)
            for mixer in self.mixers
            for rate in self.learning_rates
            for seed in self.seeds
        ]
        for run in found:
            run.check()
        return found


class Finished(NamedTuple):
    """A run with its result."""

    run: Run
    result: Result


def run_study(
    study: Study,
    folder: Path,
    device: torch.device,
    progress: Progress = lambda step, words: None,
    started: Callable[[Run, int, int], None] = lambda run, index, count: None,
    kept: Callable[[list[Finished], int], None] = lambda finished, missing: None,
    jobs: int = 1,
) -> list[Finished]:
    """Train what `folder` does not hold yet, and return all runs of the study in order.

    Each finished run is a line of `folder`/runs.jsonl, on disk as soon as it ends. One call at a time a folder.

    Args:
        progress: called at each validation of a run, if `jobs` is 1.
        started: called before a run is trained, with its place among those to train and their number, if `jobs` is 1.
        kept: called after a run is on disk, with all that are, in order, and the number of those to come.
        jobs: runs at a time, each in a process of its own if there are several.

    Raises:
        ValueError: the folder holds another study, or a run is impossible.
        RuntimeError: runs failed that were trained beside others; after those ended.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    runs = study.runs()
    claim(study, folder)
    done = finished_results(folder)
    missing = [run for run in runs if run.key() not in done]

    def one_by_one() -> Iterator[tuple[Run, Result]]:
        for index, run in enumerate(missing):
            started(run, index, len(missing))
            yield run, train(run, device, progress)

    ends = train_side_by_side(missing, device, jobs) if jobs > 1 and len(missing) > 1 else one_by_one()
    for count, (run, result) in enumerate(ends, 1):
        line = {"key": run.key(), "device": device.type, "run": asdict(run), "result": asdict(result)}
        with open(folder / RUNS, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        done[run.key()] = result
        kept([Finished(run, done[run.key()]) for run in runs if run.key() in done], len(missing) - count)
    return [Finished(run, done[run.key()]) for run in runs]


def claim(study: Study, folder: Path) -> None:
    """Make the folder this study's.

    Raises:
        ValueError: it is another one's; says in what they differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, ours = folder / STUDY, json.loads(json.dumps(given(study)))
    if not path.exists():
        if (folder / RUNS).exists():
            raise ValueError(f"{folder} holds {RUNS} but no {STUDY}: give --out another folder")
        write_atomically(path, json.dumps(ours, indent=1).encode() + b"\n")
        return
    try:
        theirs = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is not JSON: give --out another folder") from None
    if theirs != ours:
        keys = [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]
        words = "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in keys)
        raise ValueError(f"{folder} holds another study ({words}): give --out another folder")


def finished_results(folder: Path) -> dict[str, Result]:
    """The results in `folder`/runs.jsonl by the key of their run. A last line that was cut short is removed.

    Raises:
        ValueError: a line that is not a result; names it.
    """
    path, found = folder / RUNS, {}
    for number, line in enumerate(whole_lines(path), 1):
        try:
            values = json.loads(line)
            found[values["key"]] = Result.from_dict(values["result"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number} is not a result of a run: remove the line to train it again"
            ) from None
    return found


def best_rates(finished: list[Finished]) -> dict[str, float]:
    """The learning rate of each mixer with the best mean score over the seeds; of equals the smallest.

    Scores come from the training length (`Result.score`): the test lengths play no part.
    """
    scores: dict[str, dict[float, list[float]]] = {}
    for run, result in finished:
        scores.setdefault(run.mixer, {}).setdefault(run.learning_rate, []).append(result.score)
    return {mixer: max(sorted(rates), key=lambda rate: mean(rates[rate])) for mixer, rates in scores.items()}
