"""`riverrun config`: a recipe as it would run, with the origin of every value."""

from typing import Annotated

import typer

from riverrun.launch import shipped
from riverrun.launch.console import err, out


def config(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name, or the path of a .toml file.", autocompletion=shipped.complete),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's, such as train.steps=20."),
    ] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print plain TOML, which is a recipe itself.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Also show options of mixers that no layer uses.")] = False,
) -> None:
    """Show a recipe as it would run: every value, and where it comes from.

    Nothing is allocated. Whatever is wrong with the recipe is listed, and the exit code is 2.
    """
    from rich.table import Table
    from rich.text import Text

    from riverrun.train.recipe import leaves, to_toml, unused
    from riverrun.train.toml_text import toml_value

    loaded = shipped.load(recipe, overrides or [], require_inputs=False)
    if toml:
        typer.echo(to_toml(loaded.recipe), nl=False)
    else:
        idle = set() if show_all else unused(loaded.recipe)
        table = Table("key", "value", "origin", title=Text(f"recipe {loaded.recipe.name}"), title_justify="left")
        section = None
        for key, value in leaves(loaded.recipe).items():
            if key in idle:
                continue
            if section is not None and key.rpartition(".")[0] != section:
                table.add_section()
            section = key.rpartition(".")[0]
            origin = loaded.origins[key]
            style = "dim" if origin == "default" else ""
            shown = Text("unset" if value is None else toml_value(value), style=style, overflow="fold")
            table.add_row(Text(key, style=style), shown, Text(origin, style=style))
        out.print(table)
        if idle:
            out.print(Text(f"{len(idle)} options of mixers that no layer uses are not shown: --all shows them"))
    for problem in loaded.missing:
        err.print(Text(f"warning: {problem}", style="yellow"), soft_wrap=True)
