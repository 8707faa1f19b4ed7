"""What `riverrun bench` writes: tables in Markdown, a plot, and every number as JSON."""

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from riverrun import __version__
from riverrun.kernels.benchmarks.benchmark import Benchmark, Case
from riverrun.kernels.benchmarks.run import Result
from riverrun.kernels.benchmarks.timing import Time
from riverrun.train.config import LogConfig
from riverrun.train.metrics import peak_flops

PROTOCOL = "docs/benchmark-protocol.md"
PEERS = (
    "flash-linear-attention",
    "titans-pytorch",
    "mamba_ssm",
    "causal-conv1d",
    "liger-kernel",
    "pararnn",
    "flashrnn",
)


class Grid(NamedTuple):
    """A table; all columns but the first hold figures."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """Aligned, so that it reads in a terminal as well."""
        widths = [max(2, *map(len, column)) for column in zip(self.columns, *self.rows)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [
            [text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(line, widths))]
            for line in (self.columns, rule, *self.rows)
        ]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


Sweep = list[tuple[Case, list[Result]]]
AXES = {"length": "sequence length T", "heads": "heads H"}


@dataclass
class Report:
    """All of one run. `bandwidth`: bytes a second of a copy on the device. `cold`: the compilers' caches were empty.
    `sweeps`: by their axes, of `AXES`."""

    benchmark: Benchmark
    case: Case
    bandwidth: float
    repeats: int
    command: str
    cold: bool
    results: dict[str, list[Result]] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)

    def floor(self, case: Case) -> tuple[float, float]:
        """The least time, in milliseconds, of forward and backward: their bytes at the speed of a copy."""
        size = case.elements * case.dtype.itemsize / self.bandwidth * 1e3
        return self.benchmark.forward_numbers(case) * size, self.benchmark.backward_numbers(case) * size

    def grids(self) -> list[Grid]:
        found = [grid for regime in self.results for grid in (self._times(regime), self._costs(regime))]
        return found + [self._sweep(axis, what) for axis in self.sweeps for what in ("forward", "backward")]

    def shares(self, regime: str) -> dict[str, float]:
        """What recurrence and glue take of a layer's time, forward and backward, for contenders of the same maths: all
        that its matrix products alone do not. Empty where these were not measured."""
        times = {r.name: r.layer.median for r in self.results[regime] if r.layer is not None}
        if self.benchmark.products not in times:
            return {}
        same = [c.name for c in self.benchmark.contenders(self.case) if c.same_maths]
        return {name: 1 - times[self.benchmark.products] / times[name] for name in same if name in times}

    def speeds(self, regime: str) -> dict[str, dict[str, float]]:
        """FLOP/s of contenders of the same maths by the op's own products, whatever a form recomputes: forward, and of
        the layer, where forward and backward are three times as many. Empty of ops that do not count them."""
        if self.benchmark.flops is None:
            return {}
        found, flops = dict[str, dict[str, float]](), self.benchmark.flops(self.case)
        same = [c.name for c in self.benchmark.contenders(self.case) if c.same_maths]
        for r in (r for r in self.results[regime] if r.name in same):
            times = {"forward": (r.forward, flops), "layer": (r.layer, 3 * flops)}
            found[r.name] = {what: n / (t.median / 1e3) for what, (t, n) in times.items() if t is not None}
        return found

    @property
    def peak(self) -> float | None:
        """FLOP/s of the device's matrix products, where it is known."""
        return peak_flops(LogConfig(), self.case.device, "bf16" if self.case.dtype == torch.bfloat16 else "")

    def notes(self) -> list[str]:
        """What must be known to read the tables."""
        lines = []
        for regime in self.results:
            lines += [
                f"recurrence and glue: {share:.0%} of the layer's time, {name}: 1 − {self.benchmark.products} / layer"
                for name, share in self.shares(regime).items()
            ]
        lines += [f"{regime}: {self.benchmark.regimes[regime]}" for regime in self.results]
        lines.append(
            f"HBM floor: {self.benchmark.formula}, at the {self.bandwidth / 1e12:.2f} TB/s that a copy on the device "
            "reads and writes"
        )
        if self.benchmark.flops is not None:
            peak = "" if self.peak is None else f"; in brackets, the share of the device's {self.peak / 1e12:.0f}"
            lines.append(
                f"TFLOP/s: {self.benchmark.flops(self.case):.3g} FLOPs of a forward pass's matrix products, three "
                f"times that with the backward pass, whatever is recomputed{peak}"
            )
        lines.append(
            "times are medians in milliseconds, the layer's forward and backward together; × is the multiple of the "
            "first row's"
        )
        cold = (
            "compilation included; kernels that a row above, or the regime before, has compiled are not compiled again"
        )
        warm = "with what compilers had cached before"
        lines.append(f"first call: seconds of forward, then with its backward pass, {cold if self.cold else warm}")
        if self.case.device.type == "cpu":
            lines.append("times on a CPU depend on what else it does: they say little, and nothing about a GPU")
        for result in next(iter(self.results.values()), []):
            if result.note:
                lines.append(f"{result.name}: {result.note}")
        return lines

    def missing(self) -> list[str]:
        """Every contender that could not be measured in full, by the reason."""
        names: dict[str, list[str]] = {}
        for result in (r for found in self.results.values() for r in found):
            if result.skipped and result.name not in names.setdefault(result.skipped, []):
                names[result.skipped].append(result.name)
        places: dict[tuple[str, str, str], list[str]] = {}  # of the sweeps, where the reason is another one
        for axis, sweep in self.sweeps.items():
            for case, r in ((case, r) for case, found in sweep for r in found):
                if r.skipped and r.name not in names.get(r.skipped, []):
                    places.setdefault((r.skipped, r.name, AXES[axis][-1]), []).append(str(_at(axis, case)))
        lines = [f"{', '.join(group)}: {reason}" for reason, group in names.items()]
        return lines + [f"{name} at {axis} = {', '.join(at)}: {why}" for (why, name, axis), at in places.items()]

    def headline(self) -> str:
        case = self.case
        variant = f", {case.variant}" if case.variant else ""
        return (
            f"{self.benchmark.name}{variant}: B={case.B} T={case.T} D={case.D}, {case.H} heads, {_dtype(case)}, "
            f"{self.repeats} repeats"
        )

    def environment(self) -> dict[str, Any]:
        cuda = self.case.device.type == "cuda"
        return {
            "riverrun": __version__,
            "device": torch.cuda.get_device_name(self.case.device) if cuda else f"CPU, {platform.machine()}",
            "threads": None if cuda else torch.get_num_threads(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "python": platform.python_version(),
            "float32 matrix products": torch.get_float32_matmul_precision(),
            "tf32 in cuDNN": torch.backends.cudnn.allow_tf32,
            **{name: _version(name) for name in PEERS},
        }

    def _times(self, regime: str) -> Grid:
        results = self.results[regime]
        first, rows, speeds = results[0], [], self.speeds(regime)
        extra = ("forward TFLOP/s", "layer TFLOP/s") if self.benchmark.flops is not None else ()
        for r in results:
            if not any((r.forward, r.backward, r.layer)):
                continue
            cells = [r.name]
            for ours, theirs in ((first.forward, r.forward), (first.backward, r.backward), (first.layer, r.layer)):
                cells += [_time(theirs), f"{theirs.median / ours.median:.2f}" if ours and theirs else "–"]
            cells += [self._speed(speeds.get(r.name, {}).get(column.split()[0])) for column in extra]
            rows.append((*cells, "–" if r.first_call is None else f"{r.first_call:.1f}"))
        forward, backward = self.floor(self.case)
        floor = ["HBM floor"]
        for ours, least in ((first.forward, forward), (first.backward, backward)):
            floor += [f"{least:.3f}", f"{least / ours.median:.2f}" if ours else "–"]
        rows.append((*floor, "–", "–", *("–" for _ in extra), "–"))
        columns = ("contender", "forward", "×", "backward", "×", "layer", "×", *extra, "first call")
        return Grid(f"Time, {regime}", columns, rows)

    def _speed(self, flops: float | None) -> str:
        if flops is None:
            return "–"
        return f"{flops / 1e12:.2f}" + ("" if self.peak is None else f" ({flops / self.peak:.1%})")

    def _costs(self, regime: str) -> Grid:
        measured = [r for r in self.results[regime] if r.first_call is not None]
        errors = ("output", "gradients")
        rows = [
            (
                r.name,
                *(_mebibytes(x) for x in (r.forward_memory, r.backward_memory, r.layer_memory)),
                *(f"{r.error[e]:.1e}" if e in r.error else "–" for e in errors),
                _passes(r),
            )
            for r in measured
        ]
        length = next((r.error_len for r in measured if r.error_len), None)
        at = "" if length is None else f" at T={length}"
        columns = ("contender", "forward", "fwd+bwd", "layer", *errors, "passes")
        return Grid(f"Peak MiB, and relative error against float64{at}, {regime}", columns, rows)

    def _sweep(self, axis: str, what: str) -> Grid:
        names = swept(self.sweeps[axis], what)
        rows = []
        for case, results in self.sweeps[axis]:
            found = {r.name: getattr(r, what) for r in results}
            floor = self.floor(case)[what == "backward"]
            figures = (f"{t.median:.3f}" if (t := found.get(name)) else "–" for name in names)
            beside = case.B if axis == "length" else case.D // case.H
            rows.append((f"{_at(axis, case)}", f"{beside}", *figures, f"{floor:.3f}"))
        columns = ("T", "B") if axis == "length" else ("H", "D/H")
        return Grid(f"Median {what} ms over {columns[0]}", (*columns, *names, "HBM floor"), rows)


def write(report: Report, folder: Path) -> list[Path]:
    """OP.json and OP.md, and OP.png if there was a sweep. What was there is replaced."""
    name = report.benchmark.name
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    if any(report.sweeps.values()):
        paths.append(folder / f"{name}.png")
        _plot(report, paths[-1])
    paths[0].write_text(json.dumps(_document(report), indent=2) + "\n")
    paths[1].write_text(_markdown(report))
    return paths


def swept(sweep: Sweep, what: str) -> list[str]:
    """The contenders that were measured at any point, in their order."""
    measured = {r.name for _, results in sweep for r in results if getattr(r, what)}
    return [r.name for r in sweep[0][1] if r.name in measured]


def _document(report: Report) -> dict[str, Any]:
    def results(case: Case, found: list[Result]) -> dict[str, Any]:
        forward, backward = report.floor(case)
        return {
            "case": asdict(case) | {"dtype": _dtype(case), "device": case.device.type},
            "hbm_floor_ms": {"forward": forward, "backward": backward},
            "contenders": [asdict(r) for r in found],
        }

    return {
        "op": report.benchmark.name,
        "command": report.command,
        "repeats": report.repeats,
        "cold_caches": report.cold,
        "environment": report.environment(),
        "copy_bandwidth": report.bandwidth,
        "peak_flops": report.peak,
        "regimes": {
            regime: results(report.case, found)
            | {"recurrence_and_glue": report.shares(regime), "flops_per_second": report.speeds(regime)}
            for regime, found in report.results.items()
        },
        "sweeps": {axis: [results(*point) for point in sweep] for axis, sweep in report.sweeps.items()},
    }


def _markdown(report: Report) -> str:
    environment = ", ".join(f"{k} {v}" for k, v in report.environment().items() if v is not None)
    parts = [f"# {report.headline()}", f"```\n{report.command}\n```", f"{environment}. The protocol: `{PROTOCOL}`."]
    parts += [grid.markdown() for grid in report.grids()]
    if report.sweeps:
        parts.append(f"![time over {' and '.join(report.sweeps)}]({report.benchmark.name}.png)")
    parts += ["Notes", "\n".join(f"- {line}" for line in report.notes())]
    if missing := report.missing():
        parts += ["Not measured", "\n".join(f"- {line}" for line in missing)]
    return "\n\n".join(parts) + "\n"


def _plot(report: Report, path: Path) -> None:
    """A row of panels an axis: forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sweeps = {axis: sweep for axis, sweep in report.sweeps.items() if sweep}
    size = (13, 1 + 5 * len(sweeps))
    figure, panels = plt.subplots(
        len(sweeps), 2, figsize=size, layout="constrained", sharex="row", sharey="row", squeeze=False
    )
    order = [contender.name for contender in report.benchmark.contenders(report.case)]
    lines = {}
    for row, (axis, sweep) in zip(panels, sweeps.items()):
        for i, (panel, what) in enumerate(zip(row, ("forward", "backward"))):
            for name in swept(sweep, what):
                points = [(_at(axis, case), t.median * _per(axis, case)) for case, rs in sweep for r in rs
                          if r.name == name if (t := getattr(r, what))]  # fmt: skip
                style = "-" if name.startswith("riverrun") else "--"
                color = plt.get_cmap("tab20")(order.index(name) % 20)
                (lines[name],) = panel.plot(*zip(*points), style, color=color, marker=".")
            floors = [(_at(axis, case), report.floor(case)[i] * _per(axis, case)) for case, _ in sweep]
            (lines["HBM floor"],) = panel.plot(*zip(*floors), ":", color="black")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set(xlabel=AXES[axis], title=what)
            panel.grid(alpha=0.3)
        row[0].set_ylabel("ns a token, median" if axis == "length" else "ms, median")
    case = report.case
    tokens = f"{case.B * case.T:,} tokens"
    figure.suptitle(f"{report.benchmark.name} {case.variant}: D={case.D}, {_dtype(case)}, {tokens}".replace(" :", ":"))
    lines["HBM floor"] = lines.pop("HBM floor")  # last
    figure.legend(lines.values(), lines, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=144)
    plt.close(figure)


def _per(axis: str, case: Case) -> float:
    """Milliseconds of a point → what is drawn: rows longer than all tokens of the others have more, so nanoseconds a
    token over lengths; milliseconds over heads."""
    return 1e6 / (case.B * case.T) if axis == "length" else 1.0


def _at(axis: str, case: Case) -> int:
    return case.T if axis == "length" else case.H


def _time(time: Time | None) -> str:
    return "–" if time is None else f"{time.median:.3f}"


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.0f}"


def _passes(result: Result) -> str:
    """Of the forward solve, and how many of its pieces did not converge in them, if any."""
    s = result.solver
    if s is None:
        return "–"
    if not s["pieces"]:
        return "sequential"
    return f"{s['passes']}" + (f", {s['fallbacks']} of {s['pieces']} fell back" if s["fallbacks"] else "")


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
