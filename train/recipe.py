"""Read a recipe: TOML file, then dotted overrides, then the strict schema. Every problem is listed at once."""

import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from riverrun.modeling.mixer_options import OPTIONS
from riverrun.modeling.options import ModelOptions
from riverrun.train.config import Recipe
from riverrun.train.recipe_errors import Problem, dotted, explain, shortened
from riverrun.train.recipe_limits import beyond_limits
from riverrun.train.toml_text import toml_tables, toml_value

LABELS = ("name", "description")  # keys that change nothing about a run
MAX_BYTES, MAX_KEYS, MAX_DEPTH, MAX_PROBLEMS = 2**20, 2000, 16, 50  # far beyond any recipe, and quickly read

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class RecipeError(ValueError):
    """A recipe that cannot be run. `problems` holds one line for each problem, with its fix."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source} has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe with every derived size written in.

    Attributes:
        recipe: the resolved recipe.
        origins: for every dotted key of `leaves(recipe)`: "default", "recipe NAME", "command line" or "derived".
        missing: what the user still has to name before a run can start (only with `require_inputs=False`).
    """

    recipe: Recipe
    origins: dict[str, str]
    missing: list[str]


def load_recipe(
    source: str, overrides: Sequence[str] = (), folder: Path | None = None, require_inputs: bool = True
) -> LoadedRecipe:
    """Read, override, validate and resolve a recipe.

    Args:
        source: the name of a recipe in `folder`, or the path of a file ending in .toml.
        overrides: `dotted.key=value`; the value is read as TOML, and as text where that fails. Later ones win.
        folder: where recipes are looked up by name.
        require_inputs: also refuse a recipe that lacks what only the user can name (`data.train`).

    Raises:
        RecipeError: the source does not exist, or anything is wrong with it; lists every problem with its fix.
    """
    path = _locate(source, folder)
    origin = f"recipe {source.encode(errors='replace').decode()}"  # names of files need not be text
    given = _read(path, origin)
    if (wrong := _misshapen(given)) is not None:
        raise RecipeError(origin, [f"{path} {wrong}"])
    command_line, problems = _parse(overrides)
    origins = {key: origin for key, _ in _leaves(given)}
    for key, value in command_line.items():
        value = _sources(value) if key == "data.train" else value
        try:
            _set(given, key, value)
        except TypeError as error:
            problems.append(f"{key} (command line): {error}")
        else:
            origins |= {k: "command line" for k, _ in _leaves(value, key)}
    if isinstance(data := given.get("data"), dict) and "train" in data:
        data["train"] = _sources(data["train"])

    recipe, refused = _validate(given, origins)
    problems += [p.text for p in refused]
    missing: list[str] = []
    beyond = beyond_limits(recipe, origins) if recipe is not None else []
    problems += beyond
    if recipe is not None and not beyond:  # what is derived from such sizes need not exist
        missing = recipe.missing()
        suspects = {s for p in refused for s in p.suspects}
        problems += [
            p
            for p in recipe.problems()
            if (require_inputs or p not in missing) and not any(_mentions(p, s) for s in suspects)
        ]
    if problems or recipe is None:
        raise RecipeError(origin, problems)
    resolved = recipe.model_copy(update={"model": recipe.model.resolve()})
    before, after = leaves(recipe), leaves(resolved)
    final = {k: "derived" if after[k] != before[k] else origins.get(k, "default") for k in after}
    return LoadedRecipe(resolved, final, missing)


def leaves(recipe: Recipe) -> dict[str, Any]:
    """Every value by its dotted key, in the schema's order. Lists are values; unset (None) ones are included."""
    return dict(_leaves(recipe.model_dump(mode="json")))


def unused(recipe: Recipe) -> set[str]:
    """The dotted keys that no layer of the model reads: options of mixers outside of `model.layer_pattern`."""
    idle = tuple(f"model.{name}." for name in OPTIONS if name not in recipe.model.layer_pattern)
    return {key for key in leaves(recipe) if key.startswith(idle)}


def difference(a: Recipe, b: Recipe, ignore: Collection[str] = LABELS) -> list[str]:
    """What differs between two resolved recipes: `key: value in a, value in b`, a line for each key.

    Args:
        ignore: dotted keys, or sections, that may differ.
    """
    left, right = leaves(a), leaves(b)
    idle = unused(a) & unused(b)
    return [
        f"{key}: {_shown(left.get(key))} there, {_shown(right.get(key))} here"
        for key in {**left, **right}  # a table that one of them leaves out has no keys there
        if left.get(key) != right.get(key)
        and key not in idle
        and not any(key == skip or key.startswith(f"{skip}.") for skip in ignore)
    ]


def to_toml(recipe: Recipe) -> str:
    """A recipe as TOML that loads back equal to `recipe` resolved. Unset values and mixers that no layer uses are
    left out, unless the recipe gives those mixers' options another value than the default."""
    defaults = leaves(Recipe(model=ModelOptions(hidden_size=recipe.model.hidden_size).resolve()))
    idle = unused(recipe)
    return toml_tables(
        {k: v for k, v in leaves(recipe).items() if v is not None and not (k in idle and v == defaults[k])}
    )


def _shown(value: Any) -> str:
    return "unset" if value is None else toml_value(value)


def _locate(source: str, folder: Path | None) -> Path:
    path = Path(source)
    if path.suffix == ".toml" or path.name != source:
        if path.is_file():
            return path
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise RecipeError(f"recipe {source}", [f"the file {source} {what}: give the path of a TOML file"])
    names = sorted(p.stem for p in folder.glob("*.toml")) if folder else []
    if folder and source in names:
        return folder / f"{source}.toml"
    near = get_close_matches(source, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"recipe {source}",
        [f"no recipe has that name: {hint}choose from {', '.join(names) or 'none'}, or give the path of a .toml file"],
    )


def _read(path: Path, origin: str) -> dict[str, Any]:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise RecipeError(origin, [f"{path} has more than {MAX_BYTES} bytes: give the path of a recipe"])
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise RecipeError(origin, [f"{path} is not UTF-8 text: save it as UTF-8"]) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"line (\d+)", str(error))
        number = int(at[1]) if at else text.count("\n") + 1
        line = text.splitlines()[number - 1].strip() if 0 < number <= len(text.splitlines()) else ""
        raise RecipeError(
            origin,
            [
                f"{path}, line {number} is not TOML ({error}): {line!r}; "
                "text needs quotes, lists need [ ], tables a [name]"
            ],
        ) from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise RecipeError(
            origin, [f"{path} cannot be read as TOML ({error}): no value of a recipe is like that"]
        ) from None


def _misshapen(value: Any) -> str | None:
    """Why tables are so many or so deep that even telling what is wrong with each would take for ever."""
    stack, seen = [(value, 0)], 0
    while stack:
        value, depth = stack.pop()
        children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        seen += len(children)
        if seen > MAX_KEYS:
            return f"has more than {MAX_KEYS} values, more than any recipe: drop some"
        if children and depth >= MAX_DEPTH:
            return (
                f"has tables or lists nested more than {MAX_DEPTH} deep, deeper than any recipe: write fewer brackets"
            )
        stack += [(child, depth + 1) for child in children]
    return None


def _parse(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Overrides by dotted key, and what is wrong with their syntax."""
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if any("\ud800" <= character <= "\udfff" for character in override):
            problems.append(f"{override!r} is not UTF-8 text: write it as UTF-8")
        elif not equals:
            problems.append(f"{shortened(repr(override))} is not key=value: write it as train.steps=20, for example")
        elif not _KEY.fullmatch(key) or key.count(".") > MAX_DEPTH:
            problems.append(
                f"{shortened(repr(override))}: {shortened(repr(key))} is not a dotted key: write it as train.steps=20, "
                "for example"
            )
        elif not text:
            problems.append(f"{key}= has no value: give one after the equals sign, or leave the override out")
        else:
            values.pop(key, None)  # the last of several is applied last
            values[key] = _value(text)
            if (wrong := _misshapen(values[key])) is not None:
                problems.append(f"{key}= {wrong}")
                del values[key]
    return values, problems


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # not only TOMLDecodeError: thousands of digits, or of brackets
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables. A table is merged into the one that is there.

    Raises:
        TypeError: the key lies under something that is not a table.
    """
    *parents, name = key.split(".")
    for i, parent in enumerate(parents):
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise TypeError(
                f"{'.'.join(parents[: i + 1])} is a value, not a table: it has no key {name!r}; drop .{name}"
            )
    if isinstance(value, Mapping) and isinstance(table.get(name), dict):
        for k, v in value.items():
            _set(table[name], k, v)
    else:
        table[name] = value


def _sources(value: Any) -> Any:
    """`data.train` may be a path, a table, or a list of either; the schema has a list of tables."""
    sources = [value] if isinstance(value, str | dict) else value
    return [{"path": s} if isinstance(s, str) else s for s in sources] if isinstance(sources, list) else value


def _validate(given: dict[str, Any], origins: Mapping[str, str]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, without the values that are wrong (so that the rest can be checked too), and what is wrong."""
    found: dict[tuple[str | int, ...], Problem] = {}
    for key, value in _leaves(given):
        path = tuple(key.split("."))
        if any(isinstance(number, float) and not isfinite(number) for number in _plain(value)):
            shown = shortened(toml_value(value))
            found[path] = Problem(
                path, f"{key}={shown} ({_origin(path, origins)}) must be finite: give a number", (key,)
            )
        elif not isinstance(value, bool | int | float | str | list | dict):
            text = f"{key}={value} ({_origin(path, origins)}) is a date or a time, which no key takes: put it in quotes"
            found[path] = Problem(path, text, (key,))
    for problem in found.values():
        _remove(given, problem.path)
    while True:
        try:
            # JSON, because strict mode then takes lists for tuples and tables for dataclasses, but no text for a number
            recipe = Recipe.model_validate_json(json.dumps(given, default=str), strict=True)
            return recipe, list(found.values())
        except ValidationError as error:
            errors = error.errors()[:MAX_PROBLEMS]
            fresh = {tuple(e["loc"]): explain(e, _origin(e["loc"], origins)) for e in errors}
            removed = [_remove(given, path) for path in fresh]
            if not any(removed) or len(found) > MAX_PROBLEMS:
                return None, [*found.values(), *fresh.values()]
            found |= fresh


def _mentions(problem: str, key: str) -> bool:
    """Whether a problem across fields may only be there because the value of `key` was wrong, and left out."""
    key = key.partition("[")[0]
    name = key.rpartition(".")[2]
    return key in problem or (name not in Recipe.model_fields and re.search(rf"\b{name}\b", problem) is not None)


def _origin(path: Sequence[str | int], origins: Mapping[str, str]) -> str:
    """Where the value at `path` was given; of a table, where any of its values was."""
    key = dotted([p for p in path if isinstance(p, str)])
    for known, origin in origins.items():
        if known == key or known.startswith(f"{key}.") or key.startswith(f"{known}."):
            return origin
    return "default"


def _remove(given: dict[str, Any], path: Sequence[str | int]) -> bool:
    """Delete the value at `path`, or the list it is in. False if it is not there."""
    if not path:
        return False
    table: dict[Any, Any] = given
    for part in path[:-1]:
        if not isinstance(table.get(part), dict):
            return table.pop(part, None) is not None
        table = table[part]
    return table.pop(path[-1], None) is not None


def _plain(value: Any) -> Iterator[Any]:
    """What a value holds, but for lists and tables."""
    if isinstance(value, Mapping | list):
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _plain(child)
    else:
        yield value


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, child in value.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
