"""A study as tables and a plot."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.table import Table

from riverrun.eval.studies.memory import MemoryTask
from riverrun.eval.studies.run import Result
from riverrun.eval.studies.sweep import Finished, Study, best_rates
from riverrun.eval.studies.task import SequenceTask, Task
from riverrun.eval.studies.tasks import make_task
from riverrun.train.data.store import write_atomically

REPORT, PLOT = "study.md", "study.png"


@dataclass(frozen=True)
class Point:
    """A mixer at one length: the mean over seeds, with their range; of one seed, its 95% interval."""

    length: int
    accuracy: float
    low: float
    high: float
    exact: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """A mixer at its best learning rate. `at_edge`: a rate beyond the sweep may be better."""

    mixer: str
    learning_rate: float
    at_edge: bool
    points: list[Point]


def rows(study: Study, finished: list[Finished]) -> list[Row]:
    """A row for each mixer, in the study's order."""
    edges = (min(study.learning_rates), max(study.learning_rates))
    found = []
    for mixer, rate in best_rates(finished).items():
        results = [result for run, result in finished if run.mixer == mixer and run.learning_rate == rate]
        points = [_point(results, i) for i in range(len(results[0].by_length))]
        found.append(Row(mixer, rate, rate in edges, points))
    return found


def _point(results: list[Result], index: int) -> Point:
    at = [result.by_length[index] for result in results]
    values = [each.accuracy for each in at]
    low, high = (at[0].low, at[0].high) if len(at) == 1 else (min(values), max(values))
    return Point(at[0].length, mean(values), low, high, mean(each.exact for each in at))


def cells(study: Study, finished: list[Finished]) -> list[tuple[str, list[list[str]]]]:
    """(title, lines of cells, the first of them the header) of each table."""
    task, found = make_task(study.task, study.task_options), rows(study, finished)
    lengths = [f"{_size(task)} {task.length_label(point.length)}" for point in found[0].points]
    spread = "lowest–highest seed" if len(study.seeds) > 1 else "95% Wilson interval"
    number = f"mean over {len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    score = (
        "largest N learnt (and the accuracy at the next after the point)"
        if isinstance(task, MemoryTask)
        else "held-out accuracy"
    )
    main = [["mixer", "learning rate", *lengths]]
    main += [[r.mixer, _rate(r), *map(str, r.points)] for r in found]
    tables = [(f"accuracy, {number} ({spread}); chance {task.chance:.3g}", main)]
    if isinstance(task, SequenceTask) and task.scored == "all":
        exact = [["mixer", *lengths], *([r.mixer, *(f"{p.exact:.3f}" for p in r.points)] for r in found)]
        tables.append(("sequences without an error", exact))
    sweep = [["mixer", *(f"{rate:g}" for rate in study.learning_rates)]]
    for mixer in study.mixers:
        scores = [
            [result.score for run, result in finished if run.mixer == mixer and run.learning_rate == rate]
            for rate in study.learning_rates
        ]
        sweep.append([mixer, *(f"{mean(each):.3g}" if each else "–" for each in scores)])
    at = "" if isinstance(task, MemoryTask) else f" at length {task.length_label(study.train_length)}"
    tables.append((f"{score}{at} by learning rate, {number}", sweep))
    return tables


def _size(task: Task) -> str:
    return "N" if isinstance(task, MemoryTask) else "length"


def _rate(row: Row) -> str:
    return f"{row.learning_rate:g}" + (" (edge)" if row.at_edge else "")


def rich_tables(study: Study, finished: list[Finished]) -> list[Table]:
    """For the terminal."""
    found = []
    for title, (header, *lines) in cells(study, finished):
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for line in lines:
            table.add_row(*(cell.replace(" (", "\n(") for cell in line))  # narrower
        found.append(table)
    return found


def write_report(study: Study, finished: list[Finished], folder: Path) -> None:
    """Write study.md and study.png into the folder. Runs may be missing, but not all."""
    options, by_owner = ("task_options", "mixer_options", "universal"), {study.task: study.task_options}
    by_owner |= study.mixer_options | {"universal": study.universal or {}}
    lines = [f"# {study.task}", "", f"![accuracy over length]({PLOT})", ""]
    if len(finished) < len(study.runs()):
        lines += [f"{len(finished)} of {len(study.runs())} runs, so far.", ""]
    for title, (header, *body) in cells(study, finished):
        lines += [title, "", _line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, body), ""]
    lines += [
        "The learning rate is the best one on held-out data of the training length; test lengths play no part. "
        "(edge): the sweep's smallest or largest one, so that a better one may lie outside.",
        "",
        *(f"- {name.replace('_', ' ')}: {_shown(value)}" for name, value in vars(study).items() if name not in options),
        *(f"- {owner}.{key}: {value}" for owner, given in by_owner.items() for key, value in given.items()),
    ]
    write_atomically(folder / REPORT, ("\n".join(lines) + "\n").encode())
    plot(study, finished, folder / PLOT)


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def plot(study: Study, finished: list[Finished], path: Path) -> None:
    """A line a mixer over a logarithmic axis of lengths, its range shaded; chance dashed, training length dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    task = make_task(study.task, study.task_options)
    found = rows(study, finished)
    lengths = sorted({study.train_length, *study.test_lengths, *(p.length for row in found for p in row.points)})
    place = {n: i if task.evenly_spaced else n for i, n in enumerate(lengths)}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in found:
        x = [place[p.length] for p in row.points]
        (line,) = axes.plot(x, [p.accuracy for p in row.points], marker="o", linewidth=2, label=row.mixer)
        axes.fill_between(
            x, [p.low for p in row.points], [p.high for p in row.points], color=line.get_color(), alpha=0.2, linewidth=0
        )
    axes.axhline(task.chance, color="grey", linestyle="--", linewidth=1, label="chance")
    axes.axvline(place[study.train_length], color="grey", linestyle=":", linewidth=1, label="training length")
    if not task.evenly_spaced:
        axes.set_xscale("log", base=2)
    turned = 90 if task.evenly_spaced else 0
    axes.set_xticks(list(place.values()), [task.length_label(n) for n in lengths], minor=False, rotation=turned)
    axes.minorticks_off()
    title = f"{study.task}: {study.layers} layer{'s' * (study.layers > 1)} of width {study.width}"
    title += ", a Universal Transformer" * (study.universal is not None)
    axes.set(xlabel=_size(task), ylabel="accuracy", ylim=(-0.03, 1.03), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=144)
    plt.close(figure)
