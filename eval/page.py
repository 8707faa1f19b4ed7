"""A run on one page of HTML that needs nothing else: its training curves, evaluations, recipe and machine."""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from riverrun.eval.harness import RESULTS
from riverrun.train import metrics

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem; border-bottom: 1px solid #8883; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
img { max-width: 100%; background: white; border-radius: 4px; }
pre { overflow-x: auto; padding: 1rem; background: #8881; border-radius: 4px; font-size: 13px; }
.dim { opacity: .65; }
"""
PANELS = {
    "bits_per_byte": "bits per byte",
    "loss": "nats per token",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "memory_gib": "memory, GiB",
}


def page(run_dir: Path, evaluations: Sequence[Path]) -> str:
    """The page of the run in `run_dir` and of the folders of results in `evaluations`.

    Raises:
        ValueError: `run_dir` has no metrics, or a folder no results.
    """
    log = run_dir / "metrics.jsonl"
    if not log.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no metrics.jsonl")
    records = list(metrics.read(log))
    config = _text(run_dir / "config.toml")
    parts = [
        f"<h1>{html.escape(run_dir.resolve().name)}</h1>",
        f'<p class="dim">{html.escape(_summary(records))}</p>',
        "<h2>Training</h2>",
        _figure(_curves(records), "training curves") if records else "<p>No step has been recorded yet.</p>",
        "<h2>Evaluations</h2>",
        *(_evaluation(folder) for folder in evaluations),
    ]
    if not evaluations:
        parts.append("<p>None yet: <code>riverrun eval</code> writes them into the run's folder.</p>")
    versions = json.loads(_text(run_dir / "versions.json") or "{}")
    parts += [
        "<h2>Software and machine</h2>",
        _table([(name, str(version)) for name, version in versions.items() if version]),
    ]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(config or 'config.toml is missing')}</pre>"]
    title = html.escape(run_dir.resolve().name)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def evaluations_of(run_dir: Path) -> list[Path]:
    """The folders with results below RUN_DIR/eval, without those that only merge others' results."""
    found = sorted((run_dir / "eval").rglob(RESULTS))
    return [path.parent for path in found if "merged" not in json.loads(path.read_text(encoding="utf-8"))]


def _summary(records: list[dict[str, Any]]) -> str:
    trained = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "held_out"]
    if not trained:
        return "no training step recorded"
    last = trained[-1]
    parts = [f"step {last['step']:,}", f"{last['tokens']:,} tokens"]
    for name, found in (("training", trained), ("held-out", held_out)):
        if found and found[-1]["loss"] is not None:
            parts.append(f"{name} loss {found[-1]['loss']:.4f}")
    return ", ".join(parts)


def _curves(records: list[dict[str, Any]]) -> bytes:
    """A panel for every quantity that was recorded, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = {
        name: {kind: [(r["tokens"], r[name]) for r in records if r["kind"] == kind and r.get(name) is not None]
               for kind in ("train", "held_out")} for name in PANELS
    }  # fmt: skip
    shown = [name for name in PANELS if any(series[name].values())]
    rows = -(-len(shown) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.1 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown):
        for kind, style in (("train", "-"), ("held_out", "o-")):
            if points := series[name][kind]:
                axis.plot(*zip(*points), style, markersize=4, linewidth=1.2, label=kind.replace("_", "-"))
        axis.set(title=PANELS[name], xlabel="tokens")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend()
    file = io.BytesIO()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file.getvalue()


def _evaluation(folder: Path) -> str:
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no results: {RESULTS} is missing")
    document = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for task, found in document["results"].items():
        rows = [
            (
                name.removesuffix(",none"),
                _number(value),
                _number(found.get(f"{name.removesuffix(',none')}_stderr,none")),
            )
            for name, value in found.items()
            if name.endswith(",none") and not name.endswith("_stderr,none")
        ]
        samples = document.get("n-samples", {}).get(task, {}).get("effective")
        note = document["config"].get("model_args", document.get("model_name", ""))
        parts += [
            f"<h3>{html.escape(task)}</h3>",
            f'<p class="dim">{html.escape(str(note))}{"" if samples is None else f", {samples:,} samples"}</p>',
            _table(rows, ("metric", "value", "standard error")),
        ]
    parts += [_figure(image.read_bytes(), image.stem) for image in sorted(folder.glob("*.png"))]
    return "\n".join(parts)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _table(rows: Iterable[Sequence[str]], columns: Sequence[str] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = line(columns, "th") if columns else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"


def _figure(png: bytes, name: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>'


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
