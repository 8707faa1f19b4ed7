"""Damage and malice, drawn from a seed: for tests that a reader of files tells of them and does nothing else."""

import copy
import json
import os
import random
from typing import Any

NUMBERS = [
    0,
    1,
    -1,
    2,
    255,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    10**12,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    -1e-300,
]
TEXTS = [
    "", ".", "..", "/", "../x", "/etc/passwd", "a/../../x", "a\\b", "a\0b", "\ud800", "é", "\u202e", "\x1b[2J",
    "x" * 300, "NaN", "true", "[", "[/red]", "1e9", "0" * 64, "index.json",
]  # fmt: skip
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"a": {}}, [None], float("inf"), float("nan")]


def runs(usual: int) -> int:
    """How many inputs a test draws: RIVERRUN_FUZZ of them where it is set (`make soak`), else a few for every day."""
    return int(os.environ.get("RIVERRUN_FUZZ", usual))


def junk(rng: random.Random) -> Any:
    """A value that few expect."""
    return copy.deepcopy(rng.choice(rng.choice([NUMBERS, TEXTS, OTHERS])))


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes flipped, left out, put in, repeated, or cut off; several of it at times."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 60])
        what = rng.randrange(5)
        if what == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at : at + size]
        elif what == 2:
            data[at:at] = rng.randbytes(size)
        elif what == 3:
            data[at:at] = data[at : at + size]
        else:
            del data[at:]
    return bytes(data)


def altered(rng: random.Random, value: Any) -> Any:
    """A JSON value of which one part is another value, is gone, is there twice, or has another name."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return junk(rng)
    holder, key = rng.choice(places)
    what = rng.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[str(rng.choice(TEXTS))] = holder.pop(key)
    elif what == 1:
        holder.insert(key, copy.deepcopy(holder[key]))
    elif what == 2:
        holder[key] = copy.deepcopy(rng.choice(places)[0])
    else:
        holder[key] = junk(rng)
    return value


def altered_json(rng: random.Random, value: Any) -> bytes:
    """Of a JSON file: one or two alterations, or damage to its bytes."""
    if rng.random() < 0.4:
        return damaged(rng, json.dumps(value).encode())
    for _ in range(rng.choice([1, 1, 2])):
        value = altered(rng, value)
    return json.dumps(value).encode()


def _places(value: Any) -> Any:
    children = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, child in children:
        yield value, key
        yield from _places(child)
