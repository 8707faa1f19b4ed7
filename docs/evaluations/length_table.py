"""What length.sh found: table.md, a line an evaluation, and curves.png, a panel a model. Argument: its folder."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

out = Path(sys.argv[1])
paths = sorted(out.glob("*/*/results.json"), key=lambda path: (path.parts[-3], path.parts[-2] != "before", path))
found = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in paths}
places = [1024, 4096, 16384, 65536]


def loss_at(buckets: list[dict], position: int) -> str:
    """Of the bucket that ends at a position, or that holds it."""
    return next((f"{b['loss']:.2f}" for b in buckets if b["first"] <= position <= b["last"]), "–")


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


heads = ["model", "evaluated", *(f"loss at {place:,}" for place in places), "ratio (95%)", "verdict", "state's growth"]
lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
panels: dict[str, dict[str, list[dict]]] = {}
for folder, results in found.items():
    of = results["details"]["length"]
    buckets, interval = of["by_position"], of["ratio_95"] or [None, None]
    ratio = f"{shown(results['results']['length']['ratio,none'])} ({' to '.join(map(shown, interval))})"
    growth = shown(results["results"]["state_statistics"]["largest_growth,none"])
    losses = [loss_at(buckets, place) for place in places]
    cells = [folder.parent.name, folder.name, *losses, ratio, of["verdict"], growth]
    lines.append(f"| {' | '.join(cells)} |")
    panels.setdefault(folder.parent.name, {})[folder.name] = buckets
(out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.6), layout="constrained", squeeze=False)
for axis, (model, curves) in zip(axes[0], panels.items()):
    for name, buckets in curves.items():
        axis.plot([b["last"] for b in buckets], [b["loss"] for b in buckets], label=name, linewidth=1.5)
    axis.set_xscale("log", base=2)
    axis.set_xlim(left=64)  # before, the loss is high for want of context
    axis.set(xlabel="position (tokens of context)", ylabel="nats per token", title=model)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
figure.savefig(out / "curves.png", dpi=144)
