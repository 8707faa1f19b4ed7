"""Which of two models is better, and whether the difference is more than chance.

A and B were evaluated on the same samples, whose difficulty they share: differences are taken sample by sample. A
metric that the samples give (`SampleMetric`) is computed over those that both have, and its difference B − A has an
interval of 95%:

    McNemar     values of 0 and 1: from the samples on which they disagree, b for A and c for B alone, of n; the Wald
                interval with half a sample added to each of the four cells (Agresti and Min 2005), which is not empty
                where they never disagree; p is McNemar's exact one, two-sided.
    bootstrap   others: percentiles over resampled samples, 10,000 times.
    independent metrics without samples: from both standard errors, as if the samples had been different ones, which is
                wider than it need be where the models resemble each other.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import comb, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from riverrun.eval.harness import RESULTS, SampleMetric
from riverrun.eval.intervals import Z95, grouped, resamples
from riverrun.eval.samples import SAMPLES, Key, read

RESAMPLES, GROUPS = 10_000, 1000
OF_THE_MODEL = ("model_", "tokenizer_")  # prefixes of settings that may differ


@dataclass(frozen=True)
class Difference:
    """Of one metric between two evaluations.

    Attributes:
        a, b: the metric over the samples that both have, or as reported.
        difference: b − a; None where one is undefined.
        interval: of `difference`, 95%; None if the method cannot give one.
        method: "McNemar", "bootstrap" or "independent".
        samples: in pairs; None if not paired.
        p: McNemar's.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    a: float | None
    b: float | None
    difference: float | None
    interval: tuple[float, float] | None
    method: str
    samples: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """One task's results.

    Attributes:
        document: results.json, and `task` its name there.
        folder: with the samples.
    """

    task: str
    document: dict[str, Any]
    folder: Path

    def part(self, name: str) -> Any:
        return self.document.get(name, {}).get(self.task)

    def settings(self) -> dict[str, Any]:
        """What two evaluations must have in common."""
        own = {k: v for k, v in (self.part("configs") or {}).items() if not k.startswith(OF_THE_MODEL)}
        return own | {"version": self.part("versions")}


def load(folder: Path) -> dict[str, Evaluated]:
    """The tasks of a folder with results.json, or of the folders that it was merged from.

    Raises:
        ValueError: no results there.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no results: {RESULTS} is missing")
    document = json.loads(path.read_text(encoding="utf-8"))
    places = {task: folder / part for part, tasks in document.get("merged", {}).items() for task in tasks}
    return {task: Evaluated(task, document, places.get(task, folder)) for task in document["results"]}


def compare(a: dict[str, Evaluated], b: dict[str, Evaluated], ignore: Sequence[str] = ()) -> list[Difference]:
    """Every metric that both have.

    Args:
        ignore: settings that may differ.

    Raises:
        ValueError: no common task, or tasks of different versions or settings.
    """
    if not a.keys() & b.keys():
        raise ValueError(f"no task in common: {', '.join(a)} there, {', '.join(b)} here")
    for task in a.keys() & b.keys():
        ours, theirs = a[task].settings(), b[task].settings()
        different = sorted(
            key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key) and key not in ignore
        )
        if different:
            told = ", ".join(f"{key} ({_short(ours.get(key))}, {_short(theirs.get(key))})" for key in different)
            raise ValueError(
                f"{task} does not compare: {told} differ; evaluate again with the same, or --ignore "
                f"{' --ignore '.join(different)}"
            )
    return [difference for task in a if task in b for difference in _of_task(a[task], b[task])]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}…"


def _of_task(a: Evaluated, b: Evaluated) -> Iterator[Difference]:
    formulas = [one.part("sample_metrics") or {} for one in (a, b)]
    samples = None
    for name in _metrics(a):
        if name not in _metrics(b):
            continue
        better = (a.part("higher_is_better") or {}).get(name)
        if all(name in known for known in formulas):
            samples = samples or tuple(read(one.folder / SAMPLES) for one in (a, b))
            pair = (SampleMetric(**formulas[0][name]), SampleMetric(**formulas[1][name]))
            if (found := paired(samples, pair)) is not None:
                yield Difference(a.task, name, better, *found)
                continue
        values = [one.part("results")[f"{name},none"] for one in (a, b)]
        errors = [one.part("results").get(f"{name}_stderr,none") for one in (a, b)]
        difference = None if None in values else values[1] - values[0]
        interval = None
        if difference is not None and all(isinstance(error, int | float) for error in errors):
            reach = Z95 * sqrt(errors[0] ** 2 + errors[1] ** 2)
            interval = difference - reach, difference + reach
        yield Difference(a.task, name, better, values[0], values[1], difference, interval, "independent")


def _metrics(one: Evaluated) -> list[str]:
    names = [name.removesuffix(",none") for name in one.part("results") if name.endswith(",none")]
    return [name for name in names if not name.endswith("_stderr")]


Paired = tuple[float, float, float, tuple[float, float] | None, str, int, float | None]


def paired(samples: tuple[dict[Key, dict[str, Any]], ...], metrics: tuple[SampleMetric, SampleMetric]) -> Paired | None:
    """What `Difference` has from `a` on, over the common samples; None if there are none."""
    rows = [_columns(some, metric) for some, metric in zip(samples, metrics)]
    common = [key for key in rows[0] if key in rows[1]]
    if not common:
        return None
    table = np.array([[*rows[0][key], *rows[1][key]] for key in common])  # (n, 4): value and weight of A, of B
    if not (table[:, 1].sum() and table[:, 3].sum()):
        return None

    def values(sums: np.ndarray) -> np.ndarray:
        """(R, 4) → (R, 2)"""
        with np.errstate(invalid="ignore", divide="ignore"):
            found = sums[:, 0::2] / sums[:, 1::2] * [metric.scale for metric in metrics]
        return np.where([metric.exponential for metric in metrics], np.exp(np.minimum(found, 700)), found)

    a, b = values(table.sum(0, keepdims=True))[0].tolist()
    plain = all(metric == SampleMetric(metric.value, where=metric.where) for metric in metrics)
    if plain and np.isin(table[:, ::2], (0, 1)).all():
        first, second = (int((sign * (table[:, 0] - table[:, 2]) > 0).sum()) for sign in (1, -1))
        interval, p = mcnemar(first, second, len(table))
        return a, b, b - a, interval, "McNemar", len(table), p
    if len(table) < 2:
        return a, b, b - a, None, "bootstrap", len(table), None
    groups = grouped(table, GROUPS)
    drawn = values(resamples(len(groups), RESAMPLES) @ groups)
    low, high = np.nanpercentile(drawn[:, 1] - drawn[:, 0], [2.5, 97.5]).tolist()
    return a, b, b - a, (low, high), "bootstrap", len(table), None


def mcnemar(b: int, c: int, n: int) -> tuple[tuple[float, float], float]:
    """Of n pairs, of which the first alone is right in b and the second alone in c: the interval of the difference
    (c − b) / n, and the p-value of there being none."""
    size = n + 2
    centre, spread = (c - b) / size, b + c + 1
    reach = Z95 * sqrt(spread - (c - b) ** 2 / size) / size
    apart, fewer = b + c, min(b, c)
    p = min(1.0, 2 * sum(comb(apart, k) for k in range(fewer + 1)) / 2**apart)
    return (max(-1.0, centre - reach), min(1.0, centre + reach)), p


def _columns(samples: dict[Key, dict[str, Any]], metric: SampleMetric) -> dict[Key, tuple[float, float]]:
    """Value and weight of the samples that count for a metric, and for which it is defined."""
    return {
        key: (float(record[metric.value]), 1.0 if metric.weight is None else float(record[metric.weight]))
        for key, record in samples.items()
        if all(record.get(name) == value for name, value in metric.where.items()) and record[metric.value] is not None
    }


def as_json(names: Sequence[str], found: Sequence[Sequence[Difference]]) -> dict[str, Any]:
    """What compare.json holds; each of the others against the first."""
    return {
        "baseline": names[0],
        "comparisons": [
            {"model": name, "differences": [asdict(difference) for difference in differences]}
            for name, differences in zip(names[1:], found, strict=True)
        ],
    }


def table(differences: Sequence[Difference]) -> Table:
    found = Table()
    for name in ("task", "metric", "", "A", "B", "B − A", "95% interval", "p", "samples", "method"):
        found.add_column(name, justify="left" if name in ("task", "metric", "method") else "right")
    last = ""
    for d in differences:
        clear = d.interval is not None and not d.interval[0] <= 0 <= d.interval[1]
        found.add_row(
            "" if d.task == last else d.task, d.metric,
            "" if d.higher_is_better is None else "↑" if d.higher_is_better else "↓", *map(_number, (d.a, d.b)),
            _number(d.difference, "+"),
            "–" if d.interval is None else f"{_number(d.interval[0], '+')} to {_number(d.interval[1], '+')}",
            "–" if d.p is None else f"{d.p:.2g}", "not paired" if d.samples is None else f"{d.samples:,}", d.method,
            style="bold" if clear else None,
        )  # fmt: skip
        last = d.task
    return found


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"


def plot(names: Sequence[str], found: Sequence[Sequence[Difference]], path: Path) -> None:
    """The differences with their intervals, a panel a metric (with and without a length), as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, list[str]] = {}
    for d in (d for differences in found for d in differences if d.difference is not None):
        rows = panels.setdefault(d.metric.split("@")[0], [])
        if (row := f"{d.task} {d.metric}") not in rows:
            rows.append(row)
    if not panels:
        raise ValueError("there is nothing to draw: no metric is defined in both")
    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure, grid = plt.subplots(
        len(panels), 1, squeeze=False, layout="constrained",
        figsize=(8, 1 + 0.35 * sum(heights)), height_ratios=heights,
    )  # fmt: skip
    for axes, (metric, rows) in zip(grid[:, 0], panels.items()):
        axes.axvline(0, color="black", linewidth=1)
        for which, (name, differences) in enumerate(zip(names[1:], found)):
            shift = (which + 1) / (len(found) + 1) - 0.5
            some = [d for d in differences if f"{d.task} {d.metric}" in rows and d.difference is not None]
            places = [rows.index(f"{d.task} {d.metric}") + shift for d in some]
            axes.plot([d.difference for d in some], places, "o", color=f"C{which}", markersize=5, label=name)
            for d, place in zip(some, places):
                if d.interval is not None:
                    axes.plot(d.interval, [place, place], color=f"C{which}", linewidth=2)
        axes.set_yticks(range(len(rows)), rows)
        better = {d.higher_is_better for differences in found for d in differences if d.metric.split("@")[0] == metric}
        words = " (higher is better)" if better == {True} else " (lower is better)" if better == {False} else ""
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"difference of {metric}{words}")
        axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(f"Differences from {names[0]}, with intervals of 95%", fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
