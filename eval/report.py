"""Results for people: tables and plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from riverrun.eval.tasks.perplexity import Bucket, PerplexityResult


def perplexity_tables(result: PerplexityResult, bits_per_byte: float) -> list[Table]:
    """The figures of a text, and its loss by position."""
    summary = Table(show_header=False)
    interval = result.interval
    rows = {
        "loss (nats a token)": f"{result.loss:.4f}" + ("" if result.stderr is None else f" ± {result.stderr:.4f}"),
        "95% interval": "needs two documents" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
        "perplexity": f"{result.perplexity:,.3f}",
        "bits per byte": f"{bits_per_byte:.4f}",
        "tokens scored": f"{result.tokens:,}",
        "documents": f"{result.documents:,}",
    }
    for name, value in rows.items():
        summary.add_row(name, value)
    positions = Table()
    for name in ("tokens of context", "loss", "tokens scored"):
        positions.add_column(name, justify="right")
    for bucket in result.by_position:
        positions.add_row(span(bucket), f"{bucket.loss:.4f}", f"{bucket.tokens:,}")
    return [summary, positions]


def plot_loss_by_position(buckets: Sequence[Bucket], path: Path, title: str) -> None:
    """A step a bucket over a logarithmic axis of positions, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    edges = [bucket.first for bucket in buckets] + [buckets[-1].last + 1]
    axes.stairs([bucket.loss for bucket in buckets], edges, baseline=None, linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (tokens of context)", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=144)
    plt.close(figure)


def span(bucket: Bucket) -> str:
    return f"{bucket.first:,}" if bucket.first == bucket.last else f"{bucket.first:,}–{bucket.last:,}"


def summary_table(document: dict[str, Any]) -> Table:
    """Every metric of a results.json with its interval of 95%."""
    found = Table()
    for name in ("task", "version", "metric", "", "value", "95% interval"):
        found.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, metrics in document["results"].items():
        names = [name.removesuffix(",none") for name in metrics if name.endswith(",none") and "_stderr," not in name]
        for row, name in enumerate(names):
            value, interval = metrics[f"{name},none"], document["ci95"][task].get(name)
            better = document["higher_is_better"][task].get(name)
            found.add_row(
                "" if row else task, "" if row else str(document["versions"][task]), name,
                "" if better is None else "↑" if better else "↓", "–" if value is None else f"{value:.4f}",
                "–" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            )  # fmt: skip
    return found
