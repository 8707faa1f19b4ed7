"""What a model learns from its rows: the next token, or something else besides."""

from riverrun.train.config import Recipe
from riverrun.train.data.tokenizer import Tokenizer
from riverrun.train.objectives.objective import Objective


def make_objective(recipe: Recipe, tokenizer: Tokenizer | None) -> Objective:
    """The objective that `train.objective` names.

    Raises:
        ValueError: it needs what `recipe` or `tokenizer` lacks.
    """
    return Objective()
