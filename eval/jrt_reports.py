"""Reports of made-up products: lines of attributes and their values among sentences that do not matter.

They stand in for FDA and SWDE (`riverrun.eval.jrt_formats`) where there are no data, and are of the same shape: 10 to
40 attributes a report, no value twice, one of them asked for. A report is a pure function of (seed, number) and of what
it is to be like.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from riverrun.eval.haystack import ADJECTIVES, NOUNS

FEWEST, MOST = 10, 40  # attributes of a report
FILLER_SHARE = 0.3  # of its lines, about
KINDS = ("word pair", "number", "code", "date", "measure")
PARTS = (
    "batch", "cable", "casing", "contact", "control", "coating", "display", "filter", "frame", "grip", "housing",
    "inlet", "label", "lid", "motor", "mount", "nozzle", "panel", "pump", "seal", "sensor", "shaft", "spring", "valve",
)  # fmt: skip
ASPECTS = ("supplier", "code", "width", "weight", "test date", "material", "limit", "revision", "colour", "holder")
FILLER = (
    "The review was carried out in the usual order.",
    "No further comment was received in time.",
    "The table below was prepared by the office.",
    "This section repeats what has been agreed before.",
    "All figures are rounded where that is customary.",
    "The reader may turn to the annex for the background.",
    "It was found that the documents are complete.",
    "Changes are made known as soon as they are approved.",
    "The parties met twice and took note of the results.",
    "Nothing in this part affects the other parts.",
)
UNITS = ("mm", "cm", "kg", "g", "ml", "volts", "watts", "hours")
MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")


class Report(NamedTuple):
    """`text` are its lines; `key`, one of the attributes, has the value `value`."""

    text: str
    key: str
    value: str


def make_report(seed: int, number: int, fewest: int = FEWEST, most: int = MOST, kinds: Sequence[str] = KINDS) -> Report:
    """`fewest` to `most` attributes, values of these kinds."""
    rng = random.Random(f"{seed}/jrt/{number}")
    count = rng.randint(fewest, most)
    keys = rng.sample([f"{part} {aspect}" for part in PARTS for aspect in ASPECTS], count)
    title = f"Report on the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."
    values: list[str] = []
    while len(values) < count:  # none a part of another, or of the title: only one line answers
        value = _value(rng, kinds)
        if value not in title and not any(value in other or other in value for other in values):
            values.append(value)
    lines = [title]
    for key, value in zip(keys, values):
        if rng.random() < FILLER_SHARE:
            lines.append(rng.choice(FILLER))
        lines.append(f"{key[0].upper()}{key[1:]}: {value}.")
    asked = rng.randrange(count)
    return Report("\n".join(lines), keys[asked], values[asked])


def _value(rng: random.Random, kinds: Sequence[str]) -> str:
    kind = rng.choice(kinds)
    if kind == "word pair":
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    if kind == "number":
        return str(rng.randint(1000, 99999))
    if kind == "code":
        return "".join(rng.choices("ABCDEFGHKLMNPRSTUVWXYZ", k=3)) + f"-{rng.randint(10, 999)}"
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1970, 2024)}"
    return f"{rng.randint(2, 999)} {rng.choice(UNITS)}"
