"""The recipes that come with the package, and reading a recipe by its name or file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the schema imports torch, which shell completion must not wait for
    from riverrun.train.recipe import LoadedRecipe

FOLDER = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(source: str, overrides: Sequence[str] = (), require_inputs: bool = True) -> LoadedRecipe:
    """`train.recipe.load_recipe`, with names looked up among the shipped recipes.

    Raises:
        ValueError: every problem of the recipe and its overrides, each with its fix.
    """
    from riverrun.train.recipe import load_recipe

    return load_recipe(source, overrides, folder=FOLDER, require_inputs=require_inputs)


def complete(incomplete: str) -> Iterator[tuple[str, str]]:
    """Shell completion of a recipe's name: (name, description)."""
    for name in names():
        if name.startswith(incomplete):
            yield name, tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8")).get("description", "")
