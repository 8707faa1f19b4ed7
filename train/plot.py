"""The loss curve as a picture."""

from pathlib import Path
from typing import Any


def loss_curve(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and held-out loss over tokens: in bits per byte if every record has it, else nats per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in records if r.get("loss") is not None]
    unit = "bits_per_byte" if shown and all(r.get("bits_per_byte") is not None for r in shown) else "loss"
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, style in (("train", "-"), ("held_out", "o-")):
        points = [(r["tokens"], r[unit]) for r in shown if r["kind"] == kind]
        if points:
            axes.plot(*zip(*points), style, markersize=4, linewidth=1.2, label=kind.replace("_", "-"))
    axes.set(xlabel="tokens", ylabel="bits per byte" if unit == "bits_per_byte" else "nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=144)
    plt.close(figure)
