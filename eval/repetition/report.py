"""Findings about repetition as tables and bars."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from riverrun.eval.repetition.curves import Curve
from riverrun.eval.repetition.metrics import Looking

SHARES = {"egp", "ccp", "recall"}
HIGHER = {"egp", "ccp", "diversity", "recall"}
SHOWN = {
    "code": ("egp", "tr_n", "tr_s", "ccp", "rep_4"),
    "text": ("rep_1", "rep_2", "rep_3", "rep_4", "rep_w", "rep_r", "rep_sen", "diversity"),
}
COLUMNS = 4  # of a table, so that a terminal holds it
COSTS = ("length", "seconds", "perplexity")


class Figure(NamedTuple):
    value: float | None
    stderr: float | None
    interval: tuple[float, float] | None


class Row(NamedTuple):
    """A decoding: its metrics by name, each with mean, standard error and interval, None where undefined."""

    decoding: str
    samples: int
    metrics: dict[str, Figure]


@dataclass(frozen=True)
class Findings:
    """Attributes:
    looking: rep/l, wrep and the text's own rate by l, of the set text.
    """

    set: str
    rows: list[Row]
    looking: dict[int, Looking]
    curves: list[Curve]

    @property
    def shown(self) -> list[str]:
        """The metrics that some row has, in order."""
        names = (*SHOWN[self.set], *COSTS, "recall")
        return [name for name in names if any(name in row.metrics for row in self.rows)]


def tables(findings: Findings) -> list[Table]:
    """A line a decoding; rates of looking back; the ends of the curves."""
    found = []
    for start in range(0, len(findings.shown), COLUMNS):
        shown = findings.shown[start : start + COLUMNS]
        scores = Table("decoding")
        for name in shown:
            scores.add_column(name.replace("_", "-"), justify="right")
        for row in findings.rows:
            scores.add_row(row.decoding, *(_cell(row.metrics.get(name)) for name in shown))
        found.append(scores)
    found[0].caption = "means over samples, 95% intervals below; perplexity of the outputs under the model itself"
    if findings.looking:
        looking = Table("tokens back", "rep/l", "wrep", "the text's own", caption="of the likeliest next tokens")
        for l, rates in findings.looking.items():
            looking.add_row(str(l), *(f"{rate:.3f}" for rate in rates))
        found.append(looking)
    if findings.curves:
        ends = Table(caption=f"self-reinforcement: first and last of {len(findings.curves[0].ap)} copies")
        for name in ("sentences", "AP", "IP, of the second", "WR"):
            ends.add_column(name)
        for curve in findings.curves:
            pairs = [f"{v[0]:.3f} → {v[-1]:.3f}" for v in (curve.ap, curve.ip[1:], curve.wr)]
            ends.add_row(f"{curve.sentences} {curve.set}", *pairs)
        found.append(ends)
    return found


def _cell(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "–"
    digits = 3 if abs(figure.value) < 10 else 1
    cell = f"{figure.value:.{digits}f}"
    if figure.interval is not None:
        cell += f"\n{figure.interval[0]:.{digits}f}–{figure.interval[1]:.{digits}f}"
    return cell


def plot(findings: Findings, path: Path, title: str) -> None:
    """A panel a metric, a bar a decoding with its interval; as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = findings.shown
    columns = min(5, len(shown))
    size = (2.6 * columns, (1.1 + 0.28 * len(findings.rows)) * -(-len(shown) // columns) + 0.4)
    canvas, grid = plt.subplots(-(-len(shown) // columns), columns, figsize=size, squeeze=False, layout="constrained")
    specs = [row.decoding for row in findings.rows]
    for number, axes in enumerate(grid.flat):
        if number >= len(shown):
            axes.axis("off")
            continue
        name = shown[number]
        for place, row in enumerate(findings.rows):
            each = row.metrics.get(name)
            if each is None or each.value is None:
                continue
            axes.barh(place, each.value, color=f"C{place % 10}")
            if each.interval is not None:
                axes.hlines(place, *each.interval, color="black", linewidth=1.5)
        labels = specs if number % columns == 0 else [""] * len(specs)
        axes.set_yticks(range(len(specs)), labels, fontsize=8)
        axes.invert_yaxis()
        better = "higher" if name in HIGHER else "lower"
        axes.set_title(name.replace("_", "-") + ("" if name in COSTS else f" ({better} is better)"), fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        if name in SHARES or name.startswith(("rep", "tr", "diversity")):
            axes.set_xlim(0, 1.02)
    canvas.suptitle(title, fontsize=10)
    canvas.savefig(path, dpi=144)
    plt.close(canvas)
