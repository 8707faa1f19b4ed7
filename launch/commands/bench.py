"""`riverrun bench`: how fast a kernel or a layer is, beside its alternatives, on this machine."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from riverrun.launch.console import err, out

SHORTEST, LONGEST = 1 << 4, 1 << 18  # of the sweep


def bench(
    op: Annotated[
        str,
        typer.Argument(
            help="A kernel: para_gru, para_lstm, head_rnn, gated_delta, ssd, neural_memory, diagonal_scan, "
            "causal_conv1d, gated_rms_norm or linear_cross_entropy; or a whole layer: mamba2_layer, gated_delta_layer "
            "or titans_lmm_layer; prefix_linear_attention beside attention; or mixers: a layer of each mixer beside "
            "one of attention.",
            show_default=False,
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Rows, B.")] = 8,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens a row, T.")] = 4096,
    width: Annotated[int | None, typer.Option(min=1, help="Channels, D; default: 2048, 4096 for ssd.")] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Of the recurrence, or blocks of the layer's projection; default: the op's."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="lstm, slstm, gru or elman of head_rnn; n=1, n=2, n=3 or 'n=1 V=2K' of gated_delta (its layer: n=1, "
            "n=2); N=128, N=16, N=64 or N=256 of ssd; linear, 'linear b=64', 'two layers', 'two layers b=16' or "
            "'chunk 2048' of neural_memory; real or complex of diagonal_scan; rows or documents of causal_conv1d; "
            "'after gate' or 'before gate, heads' of gated_rms_norm; the vocabulary of linear_cross_entropy. Default: "
            "the first."
        ),
    ] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Of gates, inputs and outputs.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is CUDA where there is any.")] = "auto",
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed calls of each figure; fewer than 20 are a smoke test.")
    ] = 30,
    only: Annotated[
        str, typer.Option(help="Contenders to measure: beginnings of their names, with commas between them.")
    ] = "",
    sweep: Annotated[
        Literal["all", "length", "heads", "none"],
        typer.Option(
            help="Also time over sequence lengths, at the same tokens in all, or over heads of the same width."
        ),
    ] = "all",
    sweep_min: Annotated[int, typer.Option(min=1, help="The shortest sequence of the sweep.")] = SHORTEST,
    sweep_max: Annotated[int, typer.Option(min=1, help="The longest sequence of the sweep.")] = LONGEST,
    keep_caches: Annotated[
        bool, typer.Option(help="Use what compilers have cached: quicker, but first calls do not count compilation.")
    ] = False,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The folder for the table and the plot; default: bench/OP.")
    ] = None,
) -> None:
    """Time a kernel, or a layer, beside its alternatives, in one run on the same inputs.

    Measures forward, backward, the layer with all gradients, peak memory, the first call with compilation, and the
    error against float64; then the time over sequence lengths and over heads. Writes OP.md, OP.json and OP.png.
    Contenders that are not installed, or fail, are listed with the reason. docs/benchmark-protocol.md says how it is
    done.
    """
    import sys
    from importlib import import_module

    import torch
    from rich.text import Text

    from riverrun.eval.models import resolve_device
    from riverrun.kernels.benchmarks import BENCHMARKS
    from riverrun.kernels.benchmarks.benchmark import Case
    from riverrun.kernels.benchmarks.run import compare, head_shapes, lengths, select
    from riverrun.kernels.benchmarks.run import sweep as measure
    from riverrun.kernels.benchmarks.timing import copy_bandwidth
    from riverrun.launch.bench_report import Report, write
    from riverrun.modeling.benchmarks import LAYERS

    benchmarks = BENCHMARKS | LAYERS
    if op not in benchmarks:
        raise ValueError(f"there is no benchmark of {op!r}; choose one of {', '.join(benchmarks)}")
    benchmark = benchmarks[op]
    if variant is not None and variant not in benchmark.variants:
        fix = f"choose one of {', '.join(benchmark.variants)}" if benchmark.variants else "leave --variant out"
        raise ValueError(f"{op} has no variant {variant!r}; {fix}")
    variant = variant or next(iter(benchmark.variants), "")
    width = width or benchmark.width
    heads = heads or benchmark.heads_of(width, variant)
    if width % heads:
        raise ValueError(f"--width {width} is not divisible by --heads {heads}")
    if sweep_min > sweep_max:
        raise ValueError(f"--sweep-min {sweep_min} is more than --sweep-max {sweep_max}")
    where = resolve_device(device)
    if where.index is not None:
        torch.cuda.set_device(where)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    case = Case(batch, seq_len, width, heads, types[dtype], where, variant)
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    select(benchmark.contenders(case), names)  # a wrong name is told at once
    folder = out_dir or Path("bench", op)
    folder.mkdir(parents=True, exist_ok=True)

    command = " ".join(["riverrun", *sys.argv[1:]])
    with nullcontext() if keep_caches else empty_caches(), err.status("copy bandwidth") as status:
        report = Report(benchmark, case, copy_bandwidth(where, repeats), repeats, command, cold=not keep_caches)
        for regime in benchmark.regimes:
            status.update(f"{op}, {regime}")
            found = report.results.setdefault(regime, [])
            for result in compare(benchmark, case, regime, import_module, repeats=repeats, only=names):
                found.append(result)
                status.update(f"{op}, {regime}: {result.name} is done")
                paths = write(report, folder)  # what there is stays if the run is cut off
        sweeps = {"length": lengths(case, sweep_min, sweep_max), "heads": head_shapes(benchmark, case)}
        for axis in (axis for axis in sweeps if sweep in (axis, "all") and sweeps[axis]):
            report.sweeps[axis] = []
            for shape, results in measure(benchmark, sweeps[axis], import_module, repeats=repeats, only=names):
                report.sweeps[axis].append((shape, results))
                status.update(f"{op}: T={shape.T}, {shape.H} heads, is done")
                paths = write(report, folder)

    out.print(Text(report.headline(), style="bold"), soft_wrap=True)
    out.print(Text(", ".join(f"{k} {v}" for k, v in report.environment().items() if v is not None)), soft_wrap=True)
    for grid in report.grids():
        out.print(Text(f"\n{grid.markdown()}\n"), soft_wrap=True)
    for line in report.notes():
        out.print(Text(line), soft_wrap=True)
    for line in report.missing():
        out.print(Text(f"not measured: {line}", style="yellow"), soft_wrap=True)
    out.print(Text(", ".join(map(str, paths))), soft_wrap=True)


@contextmanager
def empty_caches() -> Iterator[None]:
    """Compilers start from nothing, so that first calls include compilation; what was compiled before is kept."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="riverrun-bench-", ignore_cleanup_errors=True) as folder:
        for name in names:
            os.environ[name] = str(Path(folder, name.split("_")[0].lower()))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
