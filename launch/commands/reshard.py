"""`riverrun reshard`: a checkpoint that belongs to no layout of ranks."""

from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch.console import out as console


def reshard(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a training run.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")] = ...,  # type: ignore[assignment]
    step: Annotated[int | None, typer.Option(help="The checkpoint to rewrite; default: the newest intact one.")] = None,
) -> None:
    """Rewrite a run's checkpoint in DeepSpeed's universal format: every parameter whole, in a folder of its own.

    A run that goes on with another number of GPUs, or other values of parallel.tp, parallel.cp and engine.zero_stage,
    does not need it: `riverrun train … --resume auto` reads the shards of any layout. This is for other tools, and for
    keeping one checkpoint that does not depend on how it was trained.
    """
    from riverrun.train.universal import reshard as rewrite

    if not run_dir.is_dir():
        raise ValueError(f"there is no run folder {run_dir}: give the --run-dir of a training run")
    folder = rewrite(run_dir, out, step)
    console.print(
        f"{folder}: every parameter and its optimiser state in zero/zero/NAME. A run resumes from it with "
        f"--resume {folder}",
        soft_wrap=True,
        highlight=False,
    )
