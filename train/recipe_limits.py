"""Sizes and names that no run can have: told before anything is derived from them, counted or allocated."""

from collections.abc import Iterator, Mapping
from typing import Any

from riverrun.train.config import Recipe
from riverrun.train.recipe_errors import shortened

LARGEST = 2**53  # of any whole number
LARGEST_OF_MODEL = 2**24  # of a whole number in [model]
LIMITS: dict[str, int] = {
    "model.vocab_size": 2**27,
    "model.hidden_size": 2**16,
    "model.num_hidden_layers": 2**10,
    "model.attention.window": LARGEST,
    "model.depth.mean_recurrence": 2**10,
    "model.universal.max_steps": 2**10,
    "data.seq_len": 2**31 - 1,
    "train.global_batch_size": 2**31 - 1,
    "train.micro_batch_size": 2**31 - 1,
    "train.seed": 2**32 - 1,  # NumPy's generator takes no more
    "parallel.tp": 2**20,
    "parallel.cp": 2**20,
    "engine.collective_timeout_minutes": 10**6,
}
LARGEST_EXPAND = 2**10  # of a mixer's inner width, relative to the model's


def beyond_limits(recipe: Recipe, origins: Mapping[str, str]) -> list[str]:
    """Every value of a recipe, by its dotted key, that is beyond what there can be.

    Args:
        origins: where a value was given, by dotted key.
    """
    found = [
        f"{key}={shortened(str(value))} ({origins.get(key, 'default')}) is beyond what a run can have: use "
        f"{_limit(key)} at most"
        for key, value in _numbers(recipe.model_dump())
        if abs(value) > _limit(key)
    ]
    found += [
        f"{key}={shortened(repr(text))} ({origins.get(key, 'default')}) has characters that cannot be printed: leave "
        "them out"
        for key, text in (("name", recipe.name), ("description", recipe.description.replace("\n", "")))
        if not text.isprintable()
    ]
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    if not found and tokens >= 2**31:  # where documents end in a micro batch is counted in int32
        found = [
            f"train.micro_batch_size × data.seq_len = {tokens} tokens must be less than 2³¹ = {2**31}: lower "
            "train.micro_batch_size"
        ]
    return found


def _limit(key: str) -> int:
    name = key.rpartition(".")[2]
    if name in ("expand", "expand_v"):
        return LARGEST_EXPAND
    return LIMITS.get(key, LARGEST_OF_MODEL if key.startswith("model.") else LARGEST)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Whole numbers, and the others that sizes are derived from."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{key}.")
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        sized = isinstance(value, float) and (key in LIMITS or name in ("expand", "expand_v"))
        if whole or sized:
            yield key, value
