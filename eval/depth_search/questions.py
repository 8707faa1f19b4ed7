"""Multiple-choice questions: from JSON lines as ARC has them, or generated ones about small numbers."""

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

FIELDS = 'question, choices ({"text": [...], "label": [...]} or a list of texts), answerKey'


class Question(NamedTuple):
    """Attributes:
    choices: at least 2, all different.
    labels: as many, such as A, B, C, D.
    answer: which of them is right.
    kind: chains are chosen for all questions of a kind (held-out choice).
    """

    text: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    answer: int
    kind: str = "all"

    @property
    def prompt(self) -> str:
        """That a choice follows, after a space."""
        return f"Question: {self.text}\nAnswer:"

    @property
    def listing(self) -> str:
        """The prompt for an answer in the model's own words."""
        listed = (f"{label}. {choice}" for label, choice in zip(self.labels, self.choices))
        return "\n".join([f"Question: {self.text}", *listed, "Answer:"])

    def accepts(self, output: str) -> bool:
        """Whether the first line of an output is the right choice's text, its label, or both, in any case."""
        said = output.strip().split("\n")[0].strip().rstrip(".").casefold()
        label, text = self.labels[self.answer].casefold(), self.choices[self.answer].strip().rstrip(".").casefold()
        return said in (text, label, f"({label})", f"{label}. {text}", f"{label}) {text}", f"({label}) {text}")


def read_questions(path: Path) -> list[Question]:
    """A question a line; "kind" is optional.

    Raises:
        ValueError: no questions there, or what is wrong in which line.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{where} is not JSON: give one object a line, with {FIELDS}") from None
            found.append(_question(row, where))
    if not found:
        raise ValueError(f"{path} holds no questions: give one JSON object a line, with {FIELDS}")
    return found


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is not a JSON object: it needs {FIELDS}")
    if missing := [name for name in ("question", "choices", "answerKey") if name not in row]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: it needs {FIELDS}")
    text, given, key, kind = row["question"], row["choices"], row["answerKey"], row.get("kind", "all")
    choices: Any
    labels: Any
    if isinstance(given, Mapping):
        choices, labels = given.get("text"), given.get("label")
    else:
        choices, labels = given, list(ascii_uppercase[: len(given)] if isinstance(given, list) else "")
    for name, texts in (("the texts of choices", choices), ("the labels of choices", labels)):
        if not isinstance(texts, list) or not all(isinstance(each, str) and each.strip() for each in texts):
            raise ValueError(f"{where}: {name} must be a list of texts, none of them empty")
        if len(set(texts)) < len(texts):
            raise ValueError(f"{where}: {name} must all be different")
    if not all(isinstance(each, str) and each.strip() for each in (text, kind)):
        raise ValueError(f"{where}: question and kind must be texts, and not empty")
    if len(choices) < 2:
        raise ValueError(f"{where} has {len(choices)} choices: give at least 2")
    if len(choices) != len(labels):
        raise ValueError(f"{where} has {len(choices)} choices and labels for {len(labels)}: give one for each")
    if key not in labels:
        raise ValueError(f"{where}: answerKey={key!r} is not among the labels {', '.join(labels)}")
    return Question(text.strip(), tuple(choices), tuple(labels), labels.index(key), kind)


def make_question(seed: int, number: int) -> Question:
    """A sum, a difference, or a comparison of two numbers; a pure function of (seed, number)."""
    rng = random.Random(f"{seed}/cola/{number}")
    kind = ("addition", "subtraction", "comparison")[number % 3]
    b, a = sorted(rng.sample(range(2, 50), 2))
    if kind == "comparison":
        wanted = rng.choice(["larger", "smaller"])
        choices, right = rng.sample([a, b], 2), a if wanted == "larger" else b
        text = f"Which number is {wanted}, {choices[0]} or {choices[1]}?"
    else:
        right = a + b if kind == "addition" else a - b
        text = f"What is {a} {'plus' if kind == 'addition' else 'minus'} {b}?"
        near = [right + off for off in (-10, -3, -2, -1, 1, 2, 3, 10) if right + off >= 0]
        choices = rng.sample([right, *rng.sample(near, 3)], 4)
    labels = tuple(ascii_uppercase[: len(choices)])
    return Question(text, tuple(map(str, choices)), labels, choices.index(right), kind)


def fingerprint(questions: list[Question]) -> str:
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()
