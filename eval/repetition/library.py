"""The Python standard library as text that every machine has: its modules, and the prose in their docstrings."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from riverrun.eval.repetition.metrics import split_sentences

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "turtledemo"}
WORDS = (6, 40)  # of a sentence


def modules(seed: int) -> Iterator[tuple[str, str]]:
    """(path below the library, text) of all modules but tests, in an order that the seed decides."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    kept = sorted(path.as_posix() for path in paths if not LEFT_OUT & set(path.parts))
    random.Random(f"{seed}/modules").shuffle(kept)
    for name in kept:
        try:
            yield name, (library / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a module in another encoding


def docstrings(text: str) -> list[str]:
    """Of a module, its classes and functions; none if it is not this version's Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [docstring for docstring in found if docstring]


def prose(text: str) -> list[str]:
    """Sentences of a text that are of `WORDS` words, begin with a capital and end with a full stop."""
    return [
        sentence
        for sentence in split_sentences(text)
        if WORDS[0] <= len(sentence.split()) <= WORDS[1] and sentence[0].isupper() and sentence.endswith(".")
    ]


def documents(seed: int) -> Iterator[str]:
    """The docstrings of each module that has any, as one text of paragraphs."""
    for _, text in modules(seed):
        if found := docstrings(text):
            yield "\n\n".join(found)
