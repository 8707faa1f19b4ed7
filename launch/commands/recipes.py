"""`riverrun recipes`: what can be trained out of the box."""

from __future__ import annotations

from typing import TYPE_CHECKING

from riverrun.launch import shipped
from riverrun.launch.console import out

if TYPE_CHECKING:
    from riverrun.train.config import Recipe


def recipes() -> None:
    """List the shipped recipes, with the sizes of their models and runs.

    Parameters are counted on the model itself (built without memory), tied embeddings once.
    """
    from rich.table import Table

    table = Table("name", "parameters", "tokens", "description")
    table.columns[1].justify = table.columns[2].justify = "right"
    loaded = {name: shipped.load(name, require_inputs=False).recipe for name in shipped.names()}
    sizes = {name: count_parameters(recipe) for name, recipe in loaded.items()}
    for name in sorted(sizes, key=sizes.__getitem__):
        table.add_row(name, in_short(sizes[name]), in_short(count_tokens(loaded[name])), loaded[name].description)
    out.print(table)
    out.print("Show one:   riverrun config NAME\nTrain one:  riverrun train NAME data.train=STORE --run-dir DIR")


def count_parameters(recipe: Recipe) -> int:
    """Parameters of the recipe's model, each counted once."""
    import torch

    from riverrun.modeling.config import RiverrunConfig
    from riverrun.modeling.model import RiverrunForCausalLM

    with torch.device("meta"):
        model = RiverrunForCausalLM(RiverrunConfig.from_options(recipe.model))
    return sum(parameter.numel() for parameter in model.parameters())


def count_tokens(recipe: Recipe) -> int:
    """Tokens that a whole run of the recipe reads."""
    return recipe.train.steps * recipe.train.global_batch_size * recipe.data.seq_len


def in_short(number: int) -> str:
    """1_234_567 → "1.23M"."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"
    return str(number)
