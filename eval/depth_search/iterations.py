"""What CoLa says about a model of recurrent depth: how many iterations the chosen chains have, and what iterations more
or fewer change where nothing is searched.

right     of the questions, the share that the model answers right after so many iterations.
changed   of the questions, the share whose verdict, right or wrong, is not that of the model as it is.

Path independence predicts that a core which has settled makes whole iterations, left out or repeated, next to no-ops:
then few verdicts change, and a search corrects answers by skipping and repeating other things than iterations.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from riverrun.eval.depth_search.chains import Chain, Space
from riverrun.eval.depth_search.task import Iterated
from riverrun.eval.intervals import wilson

Shares = dict[int, dict[str, float]]


def histogram(chains: Sequence[Sequence[int]], space: Space) -> dict[int, int]:
    """How many of the chains have so many iterations."""
    return dict(sorted(Counter(sum(unit == space.core for unit in chain) for chain in chains).items()))


def by_number(iterated: Sequence[Iterated], space: Space) -> Shares:
    """`right` and `changed` for each number of iterations."""
    found: Shares = {}
    for place, number in enumerate(iterated[0].iterations):
        right = [each.right[place] for each in iterated]
        base = [each.right[each.iterations.index(space.iterations)] for each in iterated]
        found[number] = {
            "right": sum(right) / len(right),
            "changed": sum(one != other for one, other in zip(right, base)) / len(right),
        }
    return found


def changes(each: Iterated, space: Space) -> float:
    """The share of the other numbers of iterations with another verdict than the model as it is."""
    base = each.right[each.iterations.index(space.iterations)]
    return sum(right != base for right in each.right) / (len(each.right) - 1)


def shortest(each: Iterated, space: Space) -> Chain:
    """Of those that answer right; empty if none does."""
    number = next((number for number, right in zip(each.iterations, each.right) if right), None)
    return () if number is None else space.with_iterations(number)


def details(iterated: Sequence[Iterated], chains: dict[str, list[list[int]]], space: Space) -> dict[str, Any]:
    """For results.json, of the chains that answer right, by method."""
    return {
        "as_it_is": space.iterations,
        "histogram": {method: histogram(own, space) for method, own in chains.items()},
        "by_number": by_number(iterated, space),
    }


def table(iterated: Sequence[Iterated], chains: dict[str, list[list[int]]], space: Space) -> Table:
    """In per cent of the questions, with intervals of 95%; and how many chains there are of each number."""
    shares, counts = by_number(iterated, space), {method: histogram(own, space) for method, own in chains.items()}
    shown = Table(
        title=f"iterations of the core, {space.iterations} in the model as it is: questions in %, and right chains",
        caption="changed: right before and wrong now, or the other way round",
    )
    for head in ("iterations", "right", "changed", *(method.replace("_", " ") for method in chains)):
        shown.add_column(head, justify="right")
    for number in sorted(set(shares).union(*counts.values())):
        cells = (
            _percent(shares[number][name], len(iterated)) if number in shares else "–" for name in ("right", "changed")
        )
        shown.add_row(str(number), *cells, *(str(own.get(number, 0)) for own in counts.values()))
    return shown


def _percent(share: float, number: int) -> str:
    low, high = wilson(share, number)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def plot(
    iterated: Sequence[Iterated], chains: dict[str, list[list[int]]], space: Space, path: Path, title: str
) -> None:
    """The histogram of iterations, and what a number of iterations does, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    shares = by_number(iterated, space)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for place, (method, own) in enumerate(chains.items()):
        counts = histogram(own, space)
        at = [number + 0.8 * ((place + 0.5) / len(chains) - 0.5) for number in counts]
        label = method.replace("_", " ")
        left.bar(at, list(counts.values()), 0.8 / len(chains), label=label, color=f"C{place + 1}")
    for name in ("right", "changed"):
        values = [each[name] for each in shares.values()]
        reach = [[abs(value - wilson(value, len(iterated))[end]) for value in values] for end in (0, 1)]
        right.errorbar(list(shares), values, reach, marker=".", capsize=3, label=name)
    left.set(ylabel="questions answered right")
    right.set(ylabel="share of questions", ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.axvline(space.iterations, color="black", linewidth=0.8, linestyle=":", label="model as it is")
        axes.set_xlabel("iterations of the core")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
