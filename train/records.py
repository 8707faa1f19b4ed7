"""What a run tells: its metrics, its events and the line on the screen. All of it on rank 0; elsewhere nothing happens.

Events, in `RUN_DIR/events.jsonl`, are never taken back: what was skipped, saved, rolled back, interrupted.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from riverrun.train import metrics
from riverrun.train.config import Recipe
from riverrun.train.progress import Display


class Records:
    def __init__(self, recipe: Recipe, run_dir: Path, first: bool):
        self.recipe, self.run_dir, self.first = recipe, run_dir, first
        self.display = Display(False, 0, 0)
        self._file: metrics.MetricsFile | None = None
        self._dashboards: metrics.Dashboards | None = None

    def open(self, step: int) -> None:
        """From `step` on: records of later steps are dropped, for the run will write them again."""
        if not self.first:
            return
        self.close()
        self._dashboards = metrics.Dashboards(self.recipe.log, self.run_dir, self.recipe.model_dump(mode="json"), step)
        self._file = metrics.MetricsFile(self.run_dir / "metrics.jsonl", step)
        self.display = Display(True, self.recipe.train.steps, step)

    def write(self, record: dict[str, Any]) -> None:
        """A record of the metrics. What cannot be written is shown all the same, and training goes on."""
        assert self._file is not None and self._dashboards is not None
        self.display.record(record)
        with self._tolerating("metrics"):
            self._file.write(record)
            self._dashboards.write(record)

    def event(self, kind: str, step: int, message: str = "", style: str = "yellow", **values: Any) -> None:
        """Also says `message`, if there is one."""
        if not self.first:
            return
        if message:
            self.display.say(message, style=style)
        entry = {"time": round(time.time(), 3), "kind": kind, "step": step, **values}
        entry |= {"message": message} if message else {}
        with self._tolerating("events"), (self.run_dir / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @contextlib.contextmanager
    def _tolerating(self, what: str) -> Iterator[None]:
        """A full disk, or one that became read-only, must not end a run."""
        try:
            yield
        except OSError as error:
            self.display.say(f"WARNING: cannot write {what} into {self.run_dir}: {error}", style="bold red")

    def close(self) -> None:
        self.display.close()
        for opened in (self._file, self._dashboards):
            if opened is not None:
                opened.close()
        self._file = self._dashboards = None
