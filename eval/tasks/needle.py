"""Recall of facts in long texts (`riverrun.eval.haystack`), by length and depth.

Scoring. Greedy generation, after the beginning of the answer for base models, as in RULER: its needles count if the
answer occurs in the output, in any case. BABILong: the places named in the first sentence of the output must be
exactly the right one. Intervals are Wilson's (1927), 95%.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from riverrun.eval.decoding.complete import opening, respond
from riverrun.eval.harness import SampleMetric, TaskResult
from riverrun.eval.haystack import BABILONG, KINDS, PLACES, Cell, Sample, make_sample, read_haystack
from riverrun.eval.intervals import wilson
from riverrun.eval.models import LoadedModel
from riverrun.eval.samples import Key, collect

VERSION = 1


# Scoring


def is_correct(kind: str, answer: str, output: str) -> bool:
    output = output.lower()
    if kind not in BABILONG:
        return answer.lower() in output
    sentence = re.split(r"[.!?\n]", output.strip())[0]
    return {place for place in PLACES if place in sentence} == {answer}


def respond_to(model: LoadedModel, samples: list[Sample]) -> list[str]:
    """The text that a model appends to each sample's prompt; samples of one kind."""
    return respond(model, [sample.prompt for sample in samples], KINDS[samples[0].cell.kind].new_tokens)


# The task


@dataclass(frozen=True)
class Plan:
    """What is evaluated; in the order of kinds, lengths, depths, samples.

    Attributes:
        samples: of each (kind, length, depth).
        haystack: a text file; None: noise.

    Raises:
        ValueError: unknown kinds, depths outside [0, 1], counts below 1, duplicates, or niah_single_2 without a text.
    """

    kinds: tuple[str, ...] = ("passkey", "niah_single_1")
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    seed: int = 42
    haystack: Path | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"there is no needle task {kind!r}: choose among {', '.join(KINDS)}")
        for name in ("kinds", "lengths", "depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must be one or several, each once")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={list(self.depths)} must be in [0, 1], the share of the text before the needle")
        if min(self.lengths) < 1 or self.samples < 1:
            raise ValueError(f"lengths={list(self.lengths)} and samples={self.samples} must be at least 1")
        if "niah_single_2" in self.kinds and self.haystack is None:
            raise ValueError("niah_single_2 in noise is niah_single_1: give a text with --haystack, or leave it out")

    def cells(self, limit: int | None = None) -> Iterator[Cell]:
        """All of them, or the first `limit` of a kind in the order of samples, lengths, depths."""
        places = [(length, depth) for length in self.lengths for depth in self.depths]
        for kind in self.kinds:
            for place, (length, depth) in enumerate(places):
                some = range(self.samples) if limit is None else range(place, limit, len(places))
                yield from (Cell(kind, length, depth, i) for i in range(min(self.samples, len(some))))


class Record(NamedTuple):
    """A line of samples.jsonl."""

    kind: str
    length: int
    depth: float
    number: int
    answer: str
    output: str
    correct: bool


def settings(plan: Plan, model: LoadedModel) -> dict[str, Any]:
    """What samples of one folder share, as JSON types."""
    found = asdict(plan) | {
        "haystack": plan.haystack and hashlib.sha256(plan.haystack.read_bytes()).hexdigest(),
        "version": VERSION,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.dtype),
        "tokenizer_fingerprint": model.require_tokenizer().fingerprint,
    }
    return json.loads(json.dumps(found))


def evaluate(
    plan: Plan,
    folder: Path,
    config: dict[str, Any],
    make: Callable[[Cell], Sample],
    answer: Callable[[list[Sample]], list[str]],
    *,
    batch_size: int,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """All records of a plan, or `limit` of each kind: those in `folder`, and the rest.

    Args:
        answer: samples of one kind and length → the texts that follow their prompts.
        progress: told of samples done and of all.

    Raises:
        ValueError: see `collect`.
    """

    def work(keys: list[Key]) -> list[dict[str, Any]]:
        samples = [make(Cell(*key)) for key in keys]
        records = [
            Record(*sample.cell, sample.answer, output, is_correct(sample.cell.kind, sample.answer, output))
            for sample, output in zip(samples, answer(samples))
        ]
        return [record._asdict() for record in records]

    found = collect(
        folder, config, list(plan.cells(limit)), work,
        batch_size=batch_size, group=lambda key: key[:2], progress=progress,
    )  # fmt: skip
    return [Record(**record) for record in found]


def run(
    model: LoadedModel,
    plan: Plan,
    folder: Path,
    *,
    batch_size: int,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Record], list[TaskResult]]:
    """The task as the command line runs it; a folder of the same plan and model is gone on with.

    Raises:
        ValueError: lengths that the model cannot take or that are too short, no tokenizer, another configuration there,
            a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} samples leaves nothing to evaluate: give at least 1")
    if not model.is_riverrun and model.seq_len is not None and max(plan.lengths) > model.seq_len:
        raise ValueError(
            f"{model.description} takes at most {model.seq_len} tokens: leave out lengths above, such as "
            f"{max(plan.lengths)}"
        )
    tokenizer = model.require_tokenizer()
    text = None if plan.haystack is None else read_haystack(plan.haystack)
    make = partial(make_sample, tokenizer=tokenizer, text=text, seed=plan.seed, opening=len(opening(model)))
    for cell in plan.cells():
        if cell.length == min(plan.lengths):  # what is too short is known before hours of work
            make(cell)
    config = settings(plan, model)
    records = evaluate(
        plan, folder, config, make, partial(respond_to, model), batch_size=batch_size, limit=limit, progress=progress
    )  # fmt: skip
    return records, summarize(records, config, len(list(plan.cells())) // len(plan.kinds))


def accuracies(records: Iterable[Record], *by: str) -> list[dict[str, Any]]:
    """Right, total, accuracy and its interval of each group of records with equal fields `by`, in their order."""
    groups: dict[tuple, list[bool]] = {}
    for record in records:
        groups.setdefault(tuple(getattr(record, name) for name in by), []).append(record.correct)
    return [
        dict(zip(by, key))
        | {"right": sum(rights), "total": len(rights), "accuracy": sum(rights) / len(rights)}
        | {"accuracy_95": list(wilson(sum(rights) / len(rights), len(rights)))}
        for key, rights in groups.items()
    ]


def summarize(records: Sequence[Record], config: dict[str, Any], available: int) -> list[TaskResult]:
    """A result a kind, which has `available` samples without a limit. Standard errors are binomial."""
    results = []
    for total in accuracies(records, "kind"):
        own = [record for record in records if record.kind == total["kind"]]
        by_length = accuracies(own, "length")
        metrics = {"accuracy": total} | {f"accuracy@{group['length']}": group for group in by_length}
        results.append(
            TaskResult(
                total["kind"],
                VERSION,
                {name: group["accuracy"] for name, group in metrics.items()},
                {
                    name: (group["accuracy"] * (1 - group["accuracy"]) / group["total"]) ** 0.5
                    for name, group in metrics.items()
                },
                dict.fromkeys(metrics, True),
                len(own),
                available,
                {**config, "kinds": [total["kind"]], "new_tokens": KINDS[total["kind"]].new_tokens},
                {
                    "accuracy_95": total["accuracy_95"],
                    "by_length": by_length,
                    "cells": accuracies(own, "length", "depth"),
                },
                ci95={name: tuple(group["accuracy_95"]) for name, group in metrics.items()},
                sample_metrics={
                    "accuracy": SampleMetric("correct", where={"kind": total["kind"]}),
                    **{
                        f"accuracy@{group['length']}": SampleMetric(
                            "correct", where={"kind": total["kind"], "length": group["length"]}
                        )
                        for group in by_length
                    },
                },
            )
        )
    return results


def table(records: Sequence[Record]) -> Table:
    """Accuracy by kind and length."""
    found = Table()
    for name in ("task", "length", "right", "samples", "accuracy", "95% interval"):
        found.add_column(name, justify="left" if name == "task" else "right")
    for group in accuracies(records, "kind", "length"):
        low, high = group["accuracy_95"]
        found.add_row(
            group["kind"], f"{group['length']:,}", str(group["right"]), str(group["total"]),
            f"{100 * group['accuracy']:.1f}%", f"{100 * low:.1f}% to {100 * high:.1f}%",
        )  # fmt: skip
    return found


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """A heat map a kind, length across and depth down, accuracy in per cent; as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(record.kind for record in records))
    lengths, depths = (sorted({getattr(record, name) for record in records}) for name in ("length", "depth"))
    size = (2 + max(3.0, 0.8 * len(lengths)) * len(kinds), 1.6 + 0.35 * len(depths))
    figure, grid = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, kind in zip(grid[0], kinds):
        table = np.full((len(depths), len(lengths)), np.nan)
        for cell in accuracies((r for r in records if r.kind == kind), "length", "depth"):
            table[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["accuracy"]
        image = axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
        axes.set(title=kind, xlabel="length (tokens)")
    grid[0, 0].set_ylabel("depth")
    figure.colorbar(image, ax=grid, label="accuracy", fraction=0.02)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
