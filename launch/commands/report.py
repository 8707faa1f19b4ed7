"""`riverrun report`: a run on one page."""

from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch.console import out


def report(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    evaluations: Annotated[
        list[Path] | None, typer.Option("--eval", help="A folder with results.json; default: all below RUN_DIR/eval.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="The file to write; default: report.html in the run's folder.")
    ] = None,
) -> None:
    """One HTML page of a run: training curves, every evaluation's table and plots, the recipe and the machine.

    The page needs nothing beside itself. Writing it again replaces it.
    """
    from rich.text import Text

    from riverrun.eval.page import evaluations_of, page
    from riverrun.train.data.store import write_atomically

    text = page(run_dir, evaluations_of(run_dir) if evaluations is None else evaluations)
    path = to or run_dir / "report.html"
    write_atomically(path, text.encode())
    out.print(Text(str(path)), soft_wrap=True)
