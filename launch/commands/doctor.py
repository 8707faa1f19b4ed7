"""`riverrun doctor`: is this machine ready? With --slurm: are the nodes of this job?"""

import os
from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch.console import out

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    folder: Annotated[
        Path, typer.Option("--dir", help="Where runs will be written: its space and speed are checked.")
    ] = Path("."),
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm",
            help="As one task of srun on each node: compare the nodes, through files in --dir, and name bad ones.",
        ),
    ] = False,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds after which a node that has not reported is bad; with --slurm.")
    ] = 180.0,
) -> None:
    """Check versions, GPUs, compiler, disk, clock, arithmetic and communication. The exit code is 1 if one is amiss.

    With --slurm it is 86 if some nodes are bad, which are printed as [bold]bad node: NAME (reason)[/bold], and 1 if
    something is wrong on all of them.
    """
    from rich.text import Text

    if slurm:
        from riverrun.launch import doctor_slurm

        code = doctor_slurm.run(folder, os.environ, wait, lambda line: print(line, flush=True))
        raise typer.Exit(code)

    from riverrun.launch.doctor import examine

    counts = dict.fromkeys(STYLES, 0)
    for finding in examine(folder):
        counts[finding.state] += 1
        line = Text.assemble((f"{finding.state:<8}", STYLES[finding.state]), f"{finding.name}: {finding.detail}")
        out.print(line, soft_wrap=True)
        if finding.fix:
            out.print(Text(f"{'':8}fix: {finding.fix}"), soft_wrap=True)
    out.print(f"{counts['problem']} problems, {counts['warning']} warnings", highlight=False)
    if counts["problem"]:
        raise typer.Exit(1)
