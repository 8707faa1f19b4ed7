"""Reads a choice of the user: the nearest name to a wrong one, and option classes from plain values."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def choose(kind: str, name: str, choices: Iterable[str]) -> str:
    """`name`, if it is one of the choices.

    Raises:
        ValueError: it is not; names the nearest one and all.
    """
    choices = list(choices)
    if name in choices:
        return name
    near = get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no {kind} {name!r}: {hint}choose from {', '.join(choices)}")


def build(owner: str, options: type[T], values: Mapping[str, Any]) -> T:
    """An option dataclass with some values set.

    Raises:
        ValueError: an unknown option, or a value of the wrong type.
    """
    names = [f.name for f in fields(options)]  # type: ignore[arg-type]
    for key in values:
        if not names:
            raise ValueError(f"{owner} has no options: leave out {owner}.{key}")
        choose(f"option of {owner} called", key, names)
    try:
        return TypeAdapter(options).validate_python(dict(values))
    except ValidationError as error:
        lines = [
            f"{owner}.{'.'.join(map(str, e['loc'][:1]))}={e['input']!r}: {e['msg'].lower()}"
            if e["loc"]
            else str(e["ctx"]["error"])  # what the class itself raised, of its values together
            for e in error.errors()
        ]
        raise ValueError("; ".join(lines)) from None


def parse_overrides(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`owner.option=value` as {owner: {option: value}}; a value is read as TOML, and as text where that fails.

    Raises:
        ValueError: one that does not look like that.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        owner, dot, option = key.strip().partition(".")
        if not (equals and dot and owner and option):
            raise ValueError(f"--set {text!r} must look like gated_delta.num_householder=2: owner.option=value")
        try:
            found.setdefault(owner, {})[option] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found.setdefault(owner, {})[option] = value.strip()
    return found
