"""What was found, as numbers, tables and plots. Intervals are 95%: Wilson's (1927) for shares, a bootstrap for means.

shorter    of the questions that the model as it is answers right: the share that a shorter chain answers right too.
saved      the mean share of the layers that such a chain leaves out.
corrected  of the questions that the model as it is answers wrong: the share that a chain answers right.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.table import Table

from riverrun.eval.depth_search.chains import in_words
from riverrun.eval.depth_search.task import HELD_OUT, VERSION, Chosen, Found, Records
from riverrun.eval.harness import SampleMetric, TaskResult
from riverrun.eval.intervals import bootstrap, wilson

BASE, METHODS = "base", ("search", "random", HELD_OUT)
SHARES = ("accuracy", "shorter", "corrected")


class Outcome(NamedTuple):
    """A method's chain for a question, empty if it found none, and whether it is right."""

    kind: str
    base: bool
    right: bool
    chain: list[int]


class Figure(NamedTuple):
    """A mean of `number` values, its standard error (None of a single one) and its interval."""

    value: float
    stderr: float | None
    low: float
    high: float
    number: int


def outcomes(records: Records) -> dict[str, list[Outcome]]:
    """By method. Held out: of the questions whose kind has at least two different ones."""
    found, chosen = records
    base = {record.number: record.base for record in found if record.part == "search"}
    of = {
        method: [Outcome(r.kind, r.base, r.right, r.chain) for r in found if r.part == method] for method in METHODS[:2]
    }
    return of | {
        HELD_OUT: [
            Outcome(each.kind, base[number], right, each.chain)
            for each in chosen
            for number, right in zip(each.tested, each.right)
        ]
    }


def figures(of: dict[str, list[Outcome]], num_layers: int) -> dict[str, Figure | None]:
    """By metric; None where there are no questions to take it of."""
    found = {f"accuracy_{BASE}": _share([each.base for each in of["search"]])}
    for method, own in of.items():
        saved = [1 - len(each.chain) / num_layers if each.right else 0.0 for each in own if each.base]
        found[f"accuracy_{method}"] = _share([each.right for each in own])
        found[f"shorter_{method}"] = _share([share > 0 for share in saved])
        found[f"saved_{method}"] = _mean([share for share in saved if share > 0])
        found[f"corrected_{method}"] = _share([each.right for each in own if not each.base])
    found[f"gain_{HELD_OUT}"] = _mean([float(each.right) - float(each.base) for each in of[HELD_OUT]])
    return found


def _share(values: Sequence[bool]) -> Figure | None:
    if not values:
        return None
    p, n = fmean(values), len(values)
    return Figure(p, (p * (1 - p) / n) ** 0.5, *wilson(p, n), n)


def _mean(values: Sequence[float]) -> Figure | None:
    if not values:
        return None
    stderr = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Figure(fmean(values), stderr, *bootstrap(values), len(values))


def right_chains(own: Sequence[Outcome]) -> list[list[int]]:
    return [each.chain for each in own if each.right]


def usage(own: Sequence[Outcome], num_layers: int) -> list[float]:
    """How often each layer runs, on average over the chains that answer right."""
    chains = right_chains(own)
    counts = Counter(layer for chain in chains for layer in chain)
    return [counts[layer] / max(1, len(chains)) for layer in range(num_layers)]


def costs(records: Records) -> dict[str, dict[str, float]]:
    """By method: chains evaluated and forward passes of a layer, all together; and, of those found for single
    questions, the share of evaluated chains that are right."""
    found, chosen = records
    of: dict[str, Sequence[Found] | Sequence[Chosen]] = {
        method: [record for record in found if record.part == method] for method in METHODS[:2]
    }
    of[HELD_OUT] = chosen
    costs = {
        method: {"evaluations": sum(r.evaluations for r in own), "passes": sum(r.passes for r in own)}
        for method, own in of.items()
    }
    shares: dict[str, dict[str, float]] = {
        method: {"right_share": sum(r.right_chains for r in found if r.part == method) / costs[method]["evaluations"]}
        for method in METHODS[:2]
    }
    return {method: cost | shares.get(method, {}) for method, cost in costs.items()}


def summarize(records: Records, config: dict[str, Any], num_layers: int, available: int) -> list[TaskResult]:
    of = outcomes(records)
    found, kinds = figures(of, num_layers), list(dict.fromkeys(each.kind for each in of["search"]))
    by_kind = {
        kind: figures({method: [e for e in own if e.kind == kind] for method, own in of.items()}, num_layers)
        for kind in kinds
    }
    details = {
        "num_layers": num_layers,
        "questions": {name: 0 if figure is None else figure.number for name, figure in found.items()},
        "costs": costs(records),
        "lengths": {method: dict(sorted(Counter(map(len, right_chains(own))).items())) for method, own in of.items()},
        "usage": {method: usage(own, num_layers) for method, own in of.items()},
        "chosen": [each._asdict() for each in records[1]],
        "by_kind": {
            kind: {name: None if each is None else each._asdict() for name, each in own.items()}
            for kind, own in by_kind.items()
        },
    }
    return [
        TaskResult(
            "cola",
            VERSION,
            {name: None if figure is None else figure.value for name, figure in found.items()},
            {name: None if figure is None else figure.stderr for name, figure in found.items()},
            dict.fromkeys(found, True),
            len(of["search"]),
            available,
            config,
            details,
            ci95={name: None if figure is None else (figure.low, figure.high) for name, figure in found.items()},
            sample_metrics={
                f"accuracy_{BASE}": SampleMetric("base", where={"part": "search"}),
                **{f"accuracy_{method}": SampleMetric("right", where={"part": method}) for method in METHODS[:2]},
            },
        )
    ]


def tables(records: Records, num_layers: int) -> list[Table]:
    """Shares by method, in per cent, and the chains that were chosen for kinds."""
    of, cost = outcomes(records), costs(records)
    found = figures(of, num_layers)
    main = Table(
        title=f"chains of {num_layers} layers: questions in %, and 95% intervals",
        caption="shorter: of what the model answers right, what a shorter chain does too, and the layers saved; "
        "corrected: of what it answers wrong; passes: forward, of a layer",
    )
    for head in ("", "right", "shorter", "saved", "corrected", "chains", "passes"):
        main.add_column(head, justify="right" if head else "left")
    main.add_row("as it is", _percent(found[f"accuracy_{BASE}"]))
    for method in METHODS:
        shown = [found[f"{name}_{method}"] for name in ("accuracy", "shorter", "saved", "corrected")]
        spent = (f"{cost[method][name]:,}" for name in ("evaluations", "passes"))
        main.add_row(method.replace("_", " "), *map(_percent, shown), *spent)
    rest = Table(title="chains chosen on one half of a kind, right in % there and on the other half")
    for head in ("kind", "searched", "tested", "as it is", "chain"):
        rest.add_column(head, justify="left" if head in ("kind", "chain") else "right", overflow="fold")
    base = {record.number: record.base for record in records[0] if record.part == "search"}
    for each in records[1]:
        shares = (each.accuracy, fmean(each.right), fmean(base[number] for number in each.tested))
        rest.add_row(each.kind, *(f"{100 * share:.1f}" for share in shares), in_words(tuple(each.chain)))
    return [main, rest] if records[1] else [main]


def _percent(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return f"{100 * figure.value:.1f}\n{100 * figure.low:.1f} to {100 * figure.high:.1f}"


def plot_shares(records: Records, num_layers: int, path: Path, title: str) -> None:
    """Bars of the shares by method with their intervals, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = figures(outcomes(records), num_layers)
    figure, grid = plt.subplots(1, 3, figsize=(10, 3.8), width_ratios=[4, 3, 3], sharey=True, layout="constrained")
    headings = ("right", "right: a shorter chain too", "wrong: corrected")
    for axes, name, heading in zip(grid, SHARES, headings):
        names = [method for method in (BASE, *METHODS) if found.get(f"{name}_{method}") is not None]
        for place, method in enumerate(names):
            if (each := found[f"{name}_{method}"]) is not None:
                reach = [[100 * max(0.0, each.value - each.low)], [100 * max(0.0, each.high - each.value)]]
                colour = f"C{(BASE, *METHODS).index(method)}"
                axes.bar(place, 100 * each.value, 0.7, yerr=reach, capsize=3, color=colour)
        axes.set_xticks(range(len(names)), [method.replace("_", " ") for method in names], fontsize=8)
        axes.set_title(heading, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    grid[0].set(ylim=(0, 105), ylabel="questions (%)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)


def plot_layers(records: Records, num_layers: int, path: Path, title: str) -> None:
    """Of the chains that answer right: their lengths, and how often each layer runs; as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    of = outcomes(records)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for place, (method, own) in enumerate(of.items()):
        lengths, label, colour = Counter(map(len, right_chains(own))), method.replace("_", " "), f"C{place + 1}"
        shift = 0.27 * (place - 1)
        left.bar([n + shift for n in lengths], list(lengths.values()), 0.27, label=label, color=colour)
        if lengths:
            right.plot(range(num_layers), usage(own, num_layers), marker=".", label=label, color=colour)
    left.axvline(num_layers, color="black", linewidth=0.8, linestyle=":", label="model as it is")
    right.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="layers in the chain", ylabel="questions answered right")
    right.set(xlabel="layer", ylabel="runs a chain, mean", ylim=(0, None))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
