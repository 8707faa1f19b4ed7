"""`riverrun quickstart`: the main job, from text to an exported model, on text that every machine has."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's, such as train.steps=50."),
    ] = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The folder for everything it makes.")] = Path(
        "quickstart"
    ),
) -> None:
    """Tokenise real text, train a small hybrid, evaluate it, generate, export, and load the export back.

    The text is the source code of this Python's standard library. Each step is shown as the command that does it. A
    run that was stopped goes on where it was; remove the folder to begin again.
    """
    from riverrun.launch.quickstart import run

    run(run_dir, overrides or [])
