"""`riverrun doctor`: is this machine ready?"""

from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch.console import out

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    folder: Annotated[
        Path, typer.Option("--dir", help="Where runs will be written: its space and speed are checked.")
    ] = Path("."),
) -> None:
    """Check versions, GPUs, compiler, disk, arithmetic and communication. The exit code is 1 if there is a problem."""
    from rich.text import Text

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
