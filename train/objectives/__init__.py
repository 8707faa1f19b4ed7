"""What a model learns from its rows: the next token, or something else besides."""

from riverrun.train.config import Recipe
from riverrun.train.data.tokenizer import Tokenizer
from riverrun.train.objectives.objective import Objective


def make_objective(recipe: Recipe, tokenizer: Tokenizer | None) -> Objective:
    """The objective that `train.objective` names.

    Raises:
        ValueError: it needs what `recipe` or `tokenizer` lacks.
    """
    if recipe.train.objective == "ditto":
        from riverrun.train.objectives.ditto import Ditto, delimiter_ids

        return Ditto(recipe.train.ditto, delimiter_ids(recipe.train.ditto, tokenizer), recipe.train.seed)
    if recipe.train.objective == "jrt":
        from riverrun.train.objectives.jrt import JRT

        return JRT(recipe.train.jrt, recipe.train.seed, tokenizer)
    return Objective()
