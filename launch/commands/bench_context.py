"""`riverrun bench-context`: what sharing long rows among ranks gains, and what it costs."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from riverrun.launch.console import out

if TYPE_CHECKING:
    from riverrun.modeling.benchmarks.context import Row


def bench_context(
    mixer: Annotated[str, typer.Argument(help="A mixer's name, such as mamba2.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the one sequence, with commas between.")] = "32768,131072",
    width: Annotated[int, typer.Option(min=1, help="The model's width.")] = 2048,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of activations and weights.")] = "bf16",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto is CUDA where there is any.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each figure.")] = 10,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The folder for table and plot; default: bench/context_MIXER.")
    ] = None,
) -> None:
    """Time one mixer, forward and backward, on a sequence that all ranks share, against one rank that has it whole.

    Start it on the ranks that are to share: [bold]torchrun --nproc-per-node 2 -m riverrun.launch.cli bench-context
    mamba2[/bold]. Reports the speed-up, the share of the time that communication is under way, and how far the shared
    output is from the whole's.
    """
    import torch

    from riverrun.modeling.benchmarks.context import Sequence
    from riverrun.modeling.mixers import MIXERS
    from riverrun.modeling.options import ModelOptions
    from riverrun.train import distributed

    if mixer not in MIXERS:
        raise ValueError(f"there is no mixer {mixer!r}; choose one of {', '.join(MIXERS)}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world < 2:
        raise ValueError("one rank has nobody to share with: torchrun --nproc-per-node 2 -m riverrun.launch.cli …")
    sizes = [int(length) for length in lengths.split(",")]
    if wrong := [size for size in sizes if size < 1 or size % world]:
        raise ValueError(f"--lengths {wrong[0]} does not divide among {world} ranks")
    options = ModelOptions(hidden_size=width, layer_pattern=(mixer,), num_hidden_layers=1).resolve()
    if problems := options.problems():
        raise ValueError("\n".join(problems))
    rank = int(os.environ["RANK"])
    folder = out_dir or Path("bench", f"context_{mixer}")
    ranks = distributed.start(device, rank, world, int(os.environ["LOCAL_RANK"]), 10.0, cp=world)
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    title = f"{mixer}, D={width}, {dtype}, B=1, {world} x {name}, torch {torch.__version__}: forward and backward"
    about = {"mixer": mixer, "width": width, "dtype": dtype, "ranks": world, "device": name}
    rows: list[Row] = []
    try:
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        sequences = [Sequence(mixer, options, size, kind, ranks.mesh.cp, ranks.device) for size in sizes]
        for sequence in sequences:
            rows.append(sequence.measure(repeats))
            if rank == 0:
                _write(rows, title, about, folder)  # what there is stays if the run is cut off
        rows = [replace(row, communication=one.communication()) for row, one in zip(rows, sequences)]
    finally:
        distributed.stop()
    if rank == 0:
        out.print(_write(rows, title, about, folder), soft_wrap=True, markup=False, highlight=False)


def _write(rows: "list[Row]", title: str, about: dict[str, Any], folder: Path) -> str:
    """Table, figures and plot; returns the table."""
    from riverrun.launch.bench_report import Grid

    world = about["ranks"]
    columns = (
        "T", "one rank ms", f"{world} ranks ms", "speed-up", "of the ideal", "communication", "deviation",
    )  # fmt: skip
    cells: list[tuple[str, ...]] = [
        (
            f"{row.length:,}", f"{row.alone:.2f}", f"{row.shared:.2f}", f"{row.speedup:.2f}",
            f"{row.speedup / world:.0%}", "" if row.communication is None else f"{row.communication:.0%}",
            f"{row.deviation:.1e}",
        )
        for row in rows
    ]  # fmt: skip
    table = Grid(title, columns, cells).markdown()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "context.md").write_text(table + "\n", encoding="utf-8")
    record = about | {"rows": [*map(asdict, rows)]}
    (folder / "context.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(rows, title, folder / "context.png")
    return table


def _plot(rows: "list[Row]", title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens of the sequence", ylabel="ms", xscale="log", yscale="log")
    lengths = [row.length for row in rows]
    axes.plot(lengths, [row.alone for row in rows], "o-", label="one rank")
    axes.plot(lengths, [row.shared for row in rows], "o-", label="shared")
    axes.set_title(title, fontsize=8)
    axes.legend()
    figure.savefig(path, dpi=120)
