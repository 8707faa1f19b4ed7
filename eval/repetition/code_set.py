"""Prompts of Python that invite repetition, after CodeRepetEval (arXiv 2505.10402, §5), offline and from a seed.

    rr    real code: modules of the standard library are searched for runs of statements of one shape, at least
          `RUN` units of up to `PERIOD` statements; the prompt is what leads to the run, from the beginning of a
          top-level statement up to `LEAD` characters before, and the first 2 to 4 units
    as    templates: a few lines that set the scene, and 2 to 4 units with other names and values in each

Items 0, 2, 4, … are of kind `as`, the others of kind `rr`, as long as there are any. The paper's sets were chosen for
repeating under greedy decoding of its models, so that its greedy EGP is 0; ours are not chosen for any model, so
compare decodings of one model with each other, not with the paper.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from riverrun.eval.repetition.library import modules
from riverrun.eval.repetition.python_lines import Line, lines_of

RUN, PERIOD = 5, 6
UNITS = (2, 4)  # kept
LEAD = 800  # characters before the run at most
TRIVIAL = {("COMMENT",), ("STRING",), ("import", "NAME")}


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    source: "as/TEMPLATE", "rr/MODULE" or "file/NUMBER".
    units: of the repeated pattern in the prompt; 0 if unknown.
    reference: what followed in the original; empty if nothing did.
    """

    source: str
    text: str
    units: int = 0
    reference: str = ""


# Real code


@dataclass(frozen=True)
class Repeat:
    """`count` units of `period` lines from line `first` on."""

    first: int
    period: int
    count: int


def repeats(lines: list[Line]) -> list[Repeat]:
    """Runs of at least `RUN` units, each the first of its smallest period, none inside another."""
    numbers: dict[tuple, int] = {}
    keys = [numbers.setdefault(line.key, len(numbers)) for line in lines]
    equal = {p: _equal(keys, p) for p in range(1, PERIOD + 1)}
    found: list[Repeat] = []
    i = 0
    while i < len(keys):
        periods = (p for p in equal if equal[p][i] >= (RUN - 1) * p)
        p = next(periods, None)
        if p is not None and _is_whole(lines[i : i + p]):
            found.append(Repeat(i, p, 1 + equal[p][i] // p))
            i += p * found[-1].count
        else:
            i += 1
    return found


def _equal(keys: list[int], p: int) -> list[int]:
    """How many keys from each one on equal those p places later."""
    lengths = [0] * (len(keys) + 1)
    for i in range(len(keys) - p - 1, -1, -1):
        lengths[i] = lengths[i + 1] + 1 if keys[i] == keys[i + p] else 0
    return lengths


def _is_whole(unit: list[Line]) -> bool:
    """Whether a unit is of statements, the first of them outermost, and not of comments, strings or imports alone."""
    top = min(line.level for line in unit)
    whole = unit[0].level == top and all(line.depth == 0 and line.closes for line in unit) and not unit[-1].needs_more
    return whole and any(line.symbols not in TRIVIAL for line in unit) and unit[0].symbols[0] not in ("elif", "else")


def real_prompts(seed: int) -> Iterator[Prompt]:
    """One a module that has a run, in the seed's order."""
    for name, text in modules(seed):
        rng = random.Random(f"{seed}/{name}")
        lines = lines_of(text)
        found = repeats(lines)
        rng.shuffle(found)
        for repeat in found:
            begins = (
                line.begin
                for i, line in enumerate(lines[: repeat.first + 1])
                if line.level == (0, 0) and not _hangs(lines, i) and lines[repeat.first].begin - line.begin <= LEAD
            )
            begin = next(begins, None)
            if begin is None:
                continue
            units = rng.randint(*UNITS)
            cut = lines[repeat.first + units * repeat.period].begin
            after = repeat.first + repeat.count * repeat.period
            end = lines[after].begin if after < len(lines) else len(text)
            yield Prompt(f"rr/{name}", text[begin:cut], units, text[cut:end])
            break


def _hangs(lines: list[Line], i: int) -> bool:
    """Whether line i goes on with an earlier statement."""
    return lines[i].symbols[0] in ("elif", "else", "except", "finally") or (i > 0 and lines[i - 1].symbols[0] == "@")


# Templates

NAMES = re.findall(
    r"\w+",
    "amount balance buffer cache channel counter cursor delay depth factor frame gain height index interval label "
    "layer limit margin marker mode offset order origin period phase pixel prefix quota radius rate ratio region scale "
    "score session shape signal size slot speed stage state stride target token total value volume weight width window",
)
VERBS = re.findall(
    r"\w+", "add apply build check clean count find get load make merge parse pick read scale split sum trim"
)
Unit = Callable[[random.Random, str], str]
"""A generator and a name → a unit."""


def _asserts(rng: random.Random) -> tuple[str, Unit]:
    function = f"{rng.choice(VERBS)}_{rng.choice(NAMES)}"
    factor = rng.randint(2, 9)
    head = f"def {function}(values):\n    return sum(values) * {factor}\n\n\n"

    def unit(rng: random.Random, name: str) -> str:
        values = [rng.randint(-9, 99) for _ in range(rng.randint(1, 5))]
        return f"assert {function}({values}) == {sum(values) * factor}\n"

    return head, unit


def _branches(rng: random.Random) -> tuple[str, Unit]:
    given = rng.choice(NAMES)
    head = f'def {rng.choice(VERBS)}_{given}({given}):\n    if {given} is None:\n        return "none"\n'
    return head, lambda rng, name: f'    elif {given} == {rng.randint(0, 99)}:\n        return "{name}"\n'


def _table(rng: random.Random) -> tuple[str, Unit]:
    head = f"{rng.choice(NAMES).upper()}_TABLE = {{\n"
    return head, lambda rng, name: f'    "{name}": {rng.randint(0, 999)},\n'


def _setters(rng: random.Random) -> tuple[str, Unit]:
    owner = rng.choice(NAMES).capitalize()
    head = f"class {owner}:\n    def __init__(self):\n        self.ready = False\n\n"
    return head, lambda rng, name: f"    def set_{name}(self, {name}):\n        self._{name} = {name}\n\n"


def _imports(rng: random.Random) -> tuple[str, Unit]:
    package = rng.choice(NAMES)
    head = f'"""The parts of {package}."""\n\n'
    return head, lambda rng, name: f"from {package}.{name} import {rng.choice(VERBS)}_{name}\n"


TEMPLATES: dict[str, Callable[[random.Random], tuple[str, Unit]]] = {
    "asserts": _asserts,
    "branches": _branches,
    "table": _table,
    "setters": _setters,
    "imports": _imports,
}


def template_prompt(seed: int, number: int) -> Prompt:
    rng = random.Random(f"{seed}/as/{number}")
    name = list(TEMPLATES)[number % len(TEMPLATES)]
    head, unit = TEMPLATES[name](rng)
    units = rng.randint(*UNITS)
    names = rng.sample(NAMES, units)
    return Prompt(f"as/{name}", head + "".join(unit(rng, each) for each in names), units)


# The set


def code_prompts(limit: int, seed: int) -> list[Prompt]:
    """The first `limit` items of the set; more of them begin with the same."""
    real = list(islice(real_prompts(seed), limit // 2))
    made = (template_prompt(seed, number) for number in range(limit))
    rest = iter(real)
    return [next(made) if i % 2 == 0 else next(rest, None) or next(made) for i in range(limit)]


def read_prompts(path: Path, limit: int) -> list[Prompt]:
    """Those of a file in CodeRepetEval's format: JSON lines with a field `prompt`.

    Raises:
        ValueError: no such file, or not of that format.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give JSON lines with a field `prompt`")
    try:
        texts = [json.loads(line)["prompt"] for line in path.read_bytes().splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not of JSON lines with a field `prompt`, as CodeRepetEval's sets are") from None
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{path} holds no prompts, or empty ones")
    return [Prompt(f"file/{i}", text) for i, text in enumerate(texts[:limit])]
