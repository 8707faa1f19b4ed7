"""Writing TOML: the standard library only reads it."""

import json
from collections.abc import Mapping
from typing import Any


def toml_value(value: Any) -> str:
    """A plain value (text, number, boolean, list or table of those) as TOML source, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value) if isinstance(value, int | float) else str(value)


def toml_tables(values: Mapping[str, Any]) -> str:
    """A document from values by dotted key; keys of one table must follow each other."""
    tables: dict[str, list[str]] = {}
    for dotted, value in values.items():
        table, _, name = dotted.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {toml_value(value)}")
    return "\n\n".join("\n".join([f"[{table}]"] * bool(table) + lines) for table, lines in tables.items()) + "\n"


def _key(key: str) -> str:
    return key if key.replace("_", "a").replace("-", "a").isalnum() and key.isascii() else json.dumps(key)
