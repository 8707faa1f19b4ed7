"""Other languages as lines of terminals, through tree-sitter (the extra `code`); the same interface as `PythonLines`.

A line holds the leaves of the syntax tree that begin in it, named by their grammar: identifiers and literals by their
kind, keywords, operators and brackets by themselves. Its depth is that of brackets, without those that it begins by
closing: `} else if x {` is on the level of its `if`. tree-sitter mends what is incomplete, so text may stop anywhere.
"""

from importlib import import_module
from typing import Any

from riverrun.eval.repetition.python_lines import CLOSE, OPEN, Line


def load_grammar(language: str) -> Any:
    """The grammar of the package tree_sitter_LANGUAGE.

    Raises:
        ValueError: tree-sitter or that package is not installed.
    """
    try:
        from tree_sitter import Language

        package = import_module(f"tree_sitter_{language}")
        make = getattr(package, "language", None) or getattr(package, f"language_{language}")
        return Language(make())
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(
            f"language={language} needs tree-sitter and its grammar: pip install 'riverrun[code]' "
            f"tree-sitter-{language}. Python needs neither: language=python"
        ) from None


class TreeLines:
    """See `PythonLines`. The tree is brought up to date at the end of every line; then all of it is read again."""

    def __init__(self, language: str) -> None:
        from tree_sitter import Parser

        self.parser = Parser(load_grammar(language))
        self.lines: list[Line] = []
        self.text = ""
        self._tree: Any = None
        self._parsed = b""

    @property
    def num_chars(self) -> int:
        return len(self.text)

    @property
    def at_line_start(self) -> bool:
        return not self.text[self.text.rfind("\n") + 1 :].strip()

    def unfinished(self) -> Line | None:
        """The line that would be finished if it ended here."""
        if self.at_line_start:
            return None
        found = self._lines_of(self._parse(self.text + "\n"))
        return found[-1] if len(found) > len(self.lines) else None

    def feed(self, text: str) -> None:
        self.text += text
        if "\n" in text:
            whole = self.text[: self.text.rfind("\n") + 1]
            self.lines = self._lines_of(self._parse(whole))

    def _parse(self, text: str) -> Any:
        old, new = self._parsed, text.encode()
        if self._tree is not None:
            end, after = (_point(data) for data in (old, new))
            self._tree.edit(len(old), len(old), len(new), end, end, after)
        if not new.startswith(old):  # the line that was closed for a look goes on
            self._tree = None
        self._tree = self.parser.parse(new, self._tree) if self._tree is not None else self.parser.parse(new)
        self._parsed = new
        return self._tree

    def _lines_of(self, tree: Any) -> list[Line]:
        rows = self._parsed.split(b"\n")
        begins = [0]
        for text in rows:
            begins.append(begins[-1] + len(text.decode(errors="replace")) + 1)
        found: list[Line] = []
        symbols: list[str] = []
        row = depth = before = start = 0

        def finish() -> None:
            if symbols:
                closing = next((i for i, s in enumerate(symbols) if s not in CLOSE), len(symbols))
                level = max(0, before - closing)
                found.append(Line(tuple(symbols), level, 0, begins[row], start, depth == 0))

        for leaf in _leaves(tree.root_node):
            at, column = leaf.start_point
            kind = leaf.type
            if not kind.strip():
                continue  # the grammar's own newlines
            if at != row or not symbols:
                finish()
                symbols, row, before = [], at, depth
                start = begins[at] + len(rows[at][:column].decode(errors="replace"))
            symbols.append(kind)
            depth = depth + 1 if kind in OPEN else max(0, depth - 1) if kind in CLOSE else depth
        finish()
        return found


def _leaves(root: Any) -> Any:
    """Nodes without children, in order; of literals only the outermost, whatever they are made of."""
    stack = [root]
    while stack:
        node = stack.pop()
        if node.child_count == 0 or "string" in node.type or "comment" in node.type:
            if node.end_byte > node.start_byte:
                yield node
        else:
            stack.extend(reversed(node.children))


def _point(data: bytes) -> tuple[int, int]:
    return data.count(b"\n"), len(data) - data.rfind(b"\n") - 1
