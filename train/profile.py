"""A torch profiler trace of a few steps, one file a rank."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARMUP, TRACED = 3, 1, 3  # steps after the start: compilation and allocation are over by then


class Profiler:
    """Traces steps SKIPPED + WARMUP + 1 to + TRACED of this process; `step` is called after each.

    Every rank writes RUN_DIR/profile/rank_00000.json.gz, for chrome://tracing or ui.perfetto.dev, and the first one the
    operators that took longest, to RUN_DIR/profile/operators.txt.
    """

    def __init__(self, run_dir: Path, rank: int):
        self.folder, self.rank = run_dir / "profile", rank
        self.folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        steps = schedule(skip_first=SKIPPED, wait=0, warmup=WARMUP, active=TRACED, repeat=1)
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._write, acc_events=True)
        self._profile.start()

    def step(self) -> None:
        self._profile.step()

    def close(self) -> None:
        self._profile.stop()

    def _write(self, traced: Any) -> None:
        traced.export_chrome_trace(str(self.folder / f"rank_{self.rank:05d}.json.gz"))
        if self.rank == 0:
            order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = traced.key_averages().table(sort_by=order, row_limit=50, max_name_column_width=80)
            (self.folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
