"""What was found, as numbers, tables and plots. Intervals are 95%: Wilson's (1927) for shares, a bootstrap for means.

shorter    of the questions that the model as it is answers right: the share that a shorter chain answers right too.
saved      by what share of the model such a chain is shorter, on average.
corrected  of the questions that the model as it is answers wrong: the share that a chain answers right.
changed    the mean share of other numbers of iterations after which a question's verdict is another (see `iterations`).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.table import Table

from riverrun.eval.depth_search import iterations
from riverrun.eval.depth_search.chains import Space, in_words
from riverrun.eval.depth_search.task import HELD_OUT, ITERATIONS, VERSION, Chosen, Found, Iterated, Records
from riverrun.eval.harness import SampleMetric, TaskResult
from riverrun.eval.intervals import bootstrap, wilson

BASE, METHODS = "base", ("search", "random", HELD_OUT, ITERATIONS)
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


def outcomes(records: Records, space: Space) -> dict[str, list[Outcome]]:
    """By method. Held out: of the questions whose kind has at least two different ones. Iterations: the fewest that
    answer right, of models that have any."""
    found, chosen, iterated = records
    base = {record.number: record.base for record in found if record.part == "search"}
    of = {
        method: [Outcome(r.kind, r.base, r.right, r.chain) for r in found if r.part == method] for method in METHODS[:2]
    }
    of[HELD_OUT] = [
        Outcome(each.kind, base[number], right, each.chain)
        for each in chosen
        for number, right in zip(each.tested, each.right)
    ]
    if space.core is None:
        return of
    fewest = [list(iterations.shortest(each, space)) for each in iterated]
    return of | {ITERATIONS: [Outcome(each.kind, base[each.number], bool(c), c) for each, c in zip(iterated, fewest)]}


def figures(of: dict[str, list[Outcome]], space: Space) -> dict[str, Figure | None]:
    """By metric; None where there are no questions to take it of."""
    found = {f"accuracy_{BASE}": _share([each.base for each in of["search"]])}
    for method, own in of.items():
        saved = [1 - len(each.chain) / len(space.identity) if each.right else 0.0 for each in own if each.base]
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


def usage(own: Sequence[Outcome], space: Space) -> list[float]:
    """How often each unit runs, on average over the chains that answer right."""
    chains = right_chains(own)
    counts = Counter(unit for chain in chains for unit in chain)
    return [counts[unit] / max(1, len(chains)) for unit in range(space.num_units)]


def costs(records: Records) -> dict[str, dict[str, float]]:
    """By method: chains evaluated and forward passes of a unit, all together; and, of those found for single
    questions, the share of evaluated chains that are right."""
    of: dict[str, Sequence[Found] | Sequence[Chosen] | Sequence[Iterated]] = {
        method: [record for record in records.found if record.part == method] for method in METHODS[:2]
    }
    of[HELD_OUT] = records.chosen
    if records.iterated:
        of[ITERATIONS] = records.iterated
    found: dict[str, dict[str, float]] = {}
    for method, own in of.items():
        evaluations = sum(len(r.right) if isinstance(r, Iterated) else r.evaluations for r in own)
        found[method] = {"evaluations": evaluations, "passes": sum(r.passes for r in own)}
        if method in METHODS[:2]:
            found[method]["right_share"] = sum(r.right_chains for r in own if isinstance(r, Found)) / evaluations
    return found


def searched_chains(of: dict[str, list[Outcome]]) -> dict[str, list[list[int]]]:
    """Those that answer right, of the methods that do not choose by iterations alone."""
    return {method: right_chains(own) for method, own in of.items() if method != ITERATIONS}


def summarize(records: Records, config: dict[str, Any], space: Space, available: int) -> list[TaskResult]:
    of = outcomes(records, space)
    found, kinds = figures(of, space), list(dict.fromkeys(each.kind for each in of["search"]))
    by_kind = {
        kind: figures({method: [e for e in own if e.kind == kind] for method, own in of.items()}, space)
        for kind in kinds
    }
    details = {
        "num_layers": space.num_units,
        "identity": list(space.identity),
        "questions": {name: 0 if figure is None else figure.number for name, figure in found.items()},
        "costs": costs(records),
        "lengths": {method: dict(sorted(Counter(map(len, right_chains(own))).items())) for method, own in of.items()},
        "usage": {method: usage(own, space) for method, own in of.items()},
        "chosen": [each._asdict() for each in records.chosen],
        "by_kind": {
            kind: {name: None if each is None else each._asdict() for name, each in own.items()}
            for kind, own in by_kind.items()
        },
    }
    better = dict.fromkeys(found, True)
    if space.core is not None:
        found[f"changed_{ITERATIONS}"] = _mean([iterations.changes(each, space) for each in records.iterated])
        details["iterations"] = iterations.details(records.iterated, searched_chains(of), space)
    return [
        TaskResult(
            "cola",
            VERSION,
            {name: None if figure is None else figure.value for name, figure in found.items()},
            {name: None if figure is None else figure.stderr for name, figure in found.items()},
            better,
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


def units_in_words(space: Space) -> str:
    """Such as "36 layers", or those of a model of recurrent depth and how often its core runs."""
    if space.core is None:
        return f"{space.num_units} layers"
    return f"{space.num_units - 1} layers and {space.iterations} iterations of the core (unit {space.core})"


def tables(records: Records, space: Space) -> list[Table]:
    """Shares by method, in per cent, the chains that were chosen for kinds, and what iterations do."""
    of, cost = outcomes(records, space), costs(records)
    found, unit = figures(of, space), "layer" if space.core is None else "unit"
    main = Table(
        title=f"chains of {units_in_words(space)}: questions in %, and 95% intervals",
        caption=f"shorter: of what the model answers right, what a shorter chain does too, and the {unit}s saved; "
        f"corrected: of what it answers wrong; passes: forward, of a {unit}",
    )
    for head in ("", "right", "shorter", "saved", "corrected", "chains", "passes"):
        main.add_column(head, justify="right" if head else "left", no_wrap=not head)
    main.add_row("as it is", _percent(found[f"accuracy_{BASE}"]))
    for method in of:
        shown = [found[f"{name}_{method}"] for name in ("accuracy", "shorter", "saved", "corrected")]
        spent = (f"{cost[method][name]:,}" for name in ("evaluations", "passes"))
        main.add_row(method.replace("_", " "), *map(_percent, shown), *spent)
    rest = Table(title="chains chosen on one half of a kind, right in % there and on the other half")
    for head in ("kind", "searched", "tested", "as it is", "chain"):
        rest.add_column(head, justify="left" if head in ("kind", "chain") else "right", overflow="fold")
    base = {record.number: record.base for record in records.found if record.part == "search"}
    for each in records.chosen:
        shares = (each.accuracy, fmean(each.right), fmean(base[number] for number in each.tested))
        rest.add_row(each.kind, *(f"{100 * share:.1f}" for share in shares), in_words(tuple(each.chain)))
    shown_ones = [main, rest] if records.chosen else [main]
    if space.core is not None:
        shown_ones.append(iterations.table(records.iterated, searched_chains(of), space))
    return shown_ones


def _percent(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return f"{100 * figure.value:.1f}\n{100 * figure.low:.1f} to {100 * figure.high:.1f}"


def plot_shares(records: Records, space: Space, path: Path, title: str) -> None:
    """Bars of the shares by method with their intervals, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = figures(outcomes(records, space), space)
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


def plot_layers(records: Records, space: Space, path: Path, title: str) -> None:
    """Of the chains that answer right: their lengths, and how often each unit runs; as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    of, unit = outcomes(records, space), "layer" if space.core is None else "unit"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for place, (method, own) in enumerate(of.items()):
        lengths, label, colour = Counter(map(len, right_chains(own))), method.replace("_", " "), f"C{place + 1}"
        width = 0.8 / len(of)
        shift = width * (place - (len(of) - 1) / 2)
        left.bar([n + shift for n in lengths], list(lengths.values()), width, label=label, color=colour)
        if lengths:
            right.plot(range(space.num_units), usage(own, space), marker=".", label=label, color=colour)
    left.axvline(len(space.identity), color="black", linewidth=0.8, linestyle=":", label="model as it is")
    right.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel=f"{unit}s in the chain", ylabel="questions answered right")
    right.set(xlabel=unit, ylabel="runs a chain, mean", ylim=(0, None))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
