"""What a run shows on the terminal: a progress bar, or a line for every record where there is no terminal."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Rank 0's; elsewhere `enabled` is false and nothing is shown."""

    def __init__(self, enabled: bool, steps: int, step: int):
        self.console = Console(stderr=True, quiet=not enabled)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, completed=step, shown="")
        self._bar.start()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        """Shows a record of the metrics file."""
        parts = [f"{name} {value}" for name, value in _readable(record)]
        if record["kind"] == "train" and not self._bar.disable:
            self._bar.update(self._task, shown="  ".join(parts))
        else:
            self.say(f"step {record['step']}  {'held-out  ' if record['kind'] == 'held_out' else ''}{'  '.join(parts)}")

    def say(self, message: str, style: str | None = None) -> None:
        self.console.print(message, style=style, soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()


def _readable(record: dict[str, Any]) -> list[tuple[str, str]]:
    form = {
        "loss": ("loss", "{:.4f}"),
        "bits_per_byte": ("bits/byte", "{:.4f}"),
        "perplexity": ("perplexity", "{:.2f}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "mfu": ("MFU", "{:.1%}"),
        "memory_gib": ("memory", "{:.1f} GiB"),
    }
    for op in ("para_gru", "para_lstm"):  # exact, but slow: to be seen at once
        if record.get(f"{op}_fallbacks"):
            form[f"{op}_fallbacks"] = (f"{op} solved step by step", "{:.1%}")
    shown = [(name, text.format(record[key])) for key, (name, text) in form.items() if record.get(key) is not None]
    return shown + ([("skipped", str(record["skipped"]))] if record.get("skipped") else [])
