"""What pydantic finds wrong with a recipe, as one line a problem: the key, what was given, what to write instead."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel

from riverrun.train.config import Recipe
from riverrun.train.toml_text import toml_value

SHOWN = 200  # characters of a value or a key in a message
NAMED = 3  # keys of one name that one may have meant

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text in quotes",
    "list": "a list",
    "tuple": "a list",
    "dataclass": "a table of options",
    "dict": "a table of options",
    "model": "a table of options",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a value: `path` leads to it in the recipe's tables, `suspects` are the keys that
    may not mean what the schema takes them for while it stands."""

    path: tuple[str | int, ...]
    text: str
    suspects: tuple[str, ...]


def dotted(path: Sequence[str | int]) -> str:
    """("data", "train", 0, "path") → "data.train[0].path"."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def shortened(text: str) -> str:
    """Text as a message quotes it: a megabyte of it helps nobody."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 4 :]}"


def known_keys(section: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """The default of every key of the schema, by dotted key."""
    found: dict[str, Any] = {}
    instance = section()
    for name, kind in _members(section).items():
        if _is_section(kind):
            found |= known_keys(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = getattr(instance, name)
    return found


def explain(error: Mapping[str, Any], origin: str) -> Problem:
    """Word one entry of `ValidationError.errors()`. `origin` says where the value was given."""
    path = tuple(error["loc"])
    key, kind, given = dotted(path), error["type"], error.get("input")
    if kind in _UNKNOWN:
        return unknown_key(path, origin)
    if kind == "missing":
        text = f"{dotted(path[:-1])} ({origin}) lacks {path[-1]!r}: add it"
        if path[:2] == ("data", "train"):
            text += ', as in data.train=[{ path = "tokens/web", weight = 1.0 }]'
        elif isinstance(path[-1], int):
            whole = dotted(path[:-1])
            text = f"{whole}={shortened(toml_value(given))} ({origin}) is too short{_example(whole)}"
        return Problem(path, text, (key,))
    return Problem(
        path, f"{shortened(key)}={shortened(toml_value(given))} ({origin}) must be {_wanted(error, key)}", (key,)
    )


def unknown_key(path: Sequence[str | int], origin: str) -> Problem:
    """A key that the schema lacks, with the keys that may have been meant."""
    key, table = dotted(path), dotted(path[:-1])
    keys = list(known_keys())
    section = _section(path[:-1])
    siblings = list(_members(section)) if section else ["path", "weight"]
    near = [f"{table}.{n}".lstrip(".") for n in get_close_matches(str(path[-1]), siblings, n=1, cutoff=0.7)]
    near = near or [k for k in keys if k.rpartition(".")[2] == path[-1]]
    near = near or get_close_matches(key, keys, n=1, cutoff=0.85)
    if near:
        shown = near if len(near) <= NAMED else [*near[:NAMED], f"one of {len(near) - NAMED} others"]
        *others, last = shown
        fix = f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    else:
        fix = f"{f'[{table}]' if table else 'a recipe'} has {', '.join(siblings)}"
    return Problem(tuple(path), f"{shortened(key)} ({origin}) is not a recipe key: {fix}", (key, *near))


def _wanted(error: Mapping[str, Any], key: str) -> str:
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{words} {context[name]:g}{_example(key)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = get_close_matches(given, choices, n=1, cutoff=0.7) if isinstance(given, str) else []
        return f"one of {context['expected']}" + (f": did you mean {near[0]!r}?" if near else _example(key))
    if kind in ("too_long", "too_short"):
        return f"a list of {context.get('max_length', context.get('min_length'))}{_example(key)}"
    stem = kind.partition("_")[0]
    wanted = _WANTED.get(stem)
    if wanted is None:
        return f"something else: {error['msg']}{_example(key)}"
    if stem == "int" and isinstance(given, float) and given.is_integer():
        return f"{wanted}: write {key}={int(given)}"
    if stem in ("int", "float") and isinstance(given, str) and re.fullmatch(r"[+-]?[\d._]+(e[+-]?\d+)?", given, re.I):
        return f"{wanted}: write it without quotes"
    if stem == "bool" and str(given).lower() in ("true", "false", "0", "1"):
        return f"{wanted}: write {key}={'true' if str(given).lower() in ('true', '1') else 'false'}"
    if stem == "string" and not isinstance(given, Mapping | list):
        return f"{wanted}: write {key}={shortened(toml_value(str(given)))} (and quote the whole argument for the shell)"
    if stem in ("list", "tuple") and isinstance(given, str):
        items = [part.strip(" '\"") for part in given.strip("[] ").split(",")]
        return f"{wanted}: write '{key}={shortened(toml_value(items))}', with the outer quotes in a shell"
    if wanted == _WANTED["model"]:
        section = _section(error["loc"])
        names = ", ".join(_members(section)) if section else "path, weight"
        return f"{wanted}: write a table [{key}] with some of {names}"
    return wanted + _example(key)


def _example(key: str) -> str:
    whole = re.sub(r"\[\d+\].*", "", key)
    default = known_keys().get(whole)
    if default == []:
        return f", for example {whole}=" + ('["tokens/web"]' if whole == "data.train" else "[1, 8]")
    return "; leave it out for the default" if default is None else f", for example {key}={toml_value(default)}"


def _section(path: Sequence[str | int]) -> type | None:
    section: Any = Recipe
    for part in path:
        section = _members(section).get(part) if _is_section(section) else None
    return section if _is_section(section) else None


def _members(section: type) -> dict[Any, Any]:
    if is_dataclass(section):
        hints = get_type_hints(section)
        return {f.name: _given(hints[f.name]) for f in fields(section)}
    assert issubclass(section, BaseModel)
    return {name: field.annotation for name, field in section.model_fields.items()}


def _given(kind: Any) -> Any:
    """Of a table that may be left out, its type."""
    kinds = [part for part in get_args(kind) if part is not NoneType]
    return kinds[0] if len(kinds) == 1 and _is_section(kinds[0]) else kind


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind))
