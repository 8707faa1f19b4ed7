"""Python as a sequence of statement signatures, from text that may stop anywhere.

The lexer is fed characters as they come, so it does not matter how tokens cut the text: several terminals in a token,
or a string over many. It keeps what RPG's automaton (arXiv 2505.10402) reduces statements to: keywords, operators and
brackets as they are, identifiers as NAME, literals as NUMBER, STRING or CONSTANT (True, False, None, …), so that
statements of one shape are equal whatever they name. Neighbouring elements of one shape in a bracket are one (the
paper's merging of equal neighbours), and a sign belongs to its number: `f([1, 2, 3]) == -6` is `f([1]) == 6`.

A `Line` is a statement, or a physical line of one that is spread over several; strings never end one. Text in
f-strings is not looked into.
"""

import keyword
import re
from copy import copy
from typing import NamedTuple

CONSTANTS = {"True", "False", "None"}
KEYWORDS = set(keyword.kwlist) - CONSTANTS
# of more than one character, and what leads to an ellipsis
OPERATORS = set(re.findall(r"\S+", "** // << >> <= >= == != -> += -= *= /= %= &= |= ^= @= := **= //= <<= >>= .. ..."))
OPEN, CLOSE = "([{", ")]}"
PREFIXES = {"r", "b", "u", "f", "br", "rb", "fr", "rf"}
VALUES = {"NAME", "NUMBER", "STRING", "CONSTANT", *CLOSE}
PLAIN, WORD = re.compile(r"[^\\\n'\"]*"), re.compile(r"\w*")
TAB = 8  # columns that a tab reaches a multiple of, as in Python's own tokenizer


class Line(NamedTuple):
    """Attributes:
    symbols: the terminals.
    depth: open brackets at its start.
    indent: columns of white space before it; 0 inside brackets, where it says nothing.
    begin: offset of the first character of the line in the text; start: of the first that is no white space.
    closes: whether no bracket is open at its end.
    """

    symbols: tuple[str, ...]
    depth: int
    indent: int
    begin: int
    start: int
    closes: bool

    @property
    def key(self) -> tuple:
        """Equal for lines of one shape at one level."""
        return (self.depth, self.indent, self.symbols)

    @property
    def level(self) -> tuple[int, int]:
        return (self.depth, self.indent)

    @property
    def needs_more(self) -> bool:
        """Whether the grammar asks for another line: a block's header, a decorator, an open bracket."""
        return not self.closes or self.symbols[-1] == ":" or self.symbols[0] == "@"


class PythonLines:
    """Attributes:
    lines: finished ones, empty lines left out.
    num_chars: characters fed so far.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.num_chars = 0
        self._brackets: list[list] = []  # of each open one: where its last element starts, and the one before that
        self._buffer = ""  # an unfinished word, number or operator
        self._quote = ""  # of the string or comment we are in: ' " ''' \"\"\" or #
        self._quotes = 0  # quotes in a row, where they may open or close a string
        self._escaped = False
        self._begin_line()

    def _begin_line(self) -> None:
        self._symbols: list[str] = []
        self._begin, self._start, self._columns, self._depth = self.num_chars, -1, 0, len(self._brackets)
        for bracket in self._brackets:
            bracket[:] = [0, None]

    def __copy__(self) -> "PythonLines":
        other = object.__new__(PythonLines)
        other.__dict__ |= self.__dict__
        other.lines, other._symbols, other._brackets = [], list(self._symbols), [list(b) for b in self._brackets]
        return other

    @property
    def at_line_start(self) -> bool:
        """Nothing but white space in this line, and no string that goes on."""
        return self._start < 0 and not self._quote

    def unfinished(self) -> Line | None:
        """The line that would be finished if it ended here."""
        there = copy(self)
        there.feed("\n")
        return there.lines[0] if there.lines else None

    def feed(self, text: str) -> None:
        place = 0
        while place < len(text):
            if (stop := self._skipped(text, place)) > place:
                self.num_chars += stop - place
                place = stop
                continue
            self._take(text[place])
            self.num_chars += 1
            if self._ended:
                self._begin, self._ended = self.num_chars, False
            place += 1

    def _skipped(self, text: str, place: int) -> int:
        """The end of characters that change nothing: those in strings and comments, and the rest of a word."""
        if self._quote:
            return place if self._quotes or self._escaped else PLAIN.match(text, place).end()  # type: ignore[union-attr]
        if self._buffer[:1].isidentifier():
            end = WORD.match(text, place).end()  # type: ignore[union-attr]
            self._buffer += text[place:end]
            return end
        return place

    _ended = False

    def _take(self, c: str) -> None:
        if self._quote:
            if self._in_string(c):
                return
        elif self._quotes and self._opening(c):
            return
        if self._escaped:  # a backslash outside of strings joins lines
            self._escaped = False
            if c == "\n":
                return
        if self._buffer and self._continues(c):
            self._buffer += c
            return
        if c in "'\"" and self._buffer.lower() in PREFIXES:
            self._buffer = ""
        self._flush()
        if c == "\n":
            self._end_line()
        elif c.isspace():
            if self._start < 0:
                self._columns = (self._columns // TAB + 1) * TAB if c == "\t" else self._columns + 1
        elif c == "\\":
            self._escaped = True
        else:
            if self._start < 0:
                self._start = self.num_chars
            if c == "#":
                self._quote = "#"
            elif c in "'\"":
                self._buffer, self._quotes = c, 1
            else:
                self._buffer = c

    def _in_string(self, c: str) -> bool:
        """Whether the string or comment takes c."""
        if self._quote == "#":
            if c != "\n":
                return True
            self._quote = ""
            if not self._symbols:  # a comment beside code is no part of its shape
                self._add("COMMENT")
            return False
        if self._escaped:
            self._escaped = False
            return True
        if c == "\\":
            self._escaped = True
        self._quotes = self._quotes + 1 if c == self._quote[0] else 0
        if self._quotes == len(self._quote):
            self._quote, self._quotes = "", 0
            self._add("STRING")
        elif c == "\n" and len(self._quote) == 1:  # never closed
            self._quote = ""
            self._add("STRING")
            return False
        return True

    def _opening(self, c: str) -> bool:
        """After one or two quotes outside of a string: whether c belongs to the string that they open."""
        quote, count = self._buffer, self._quotes
        if c == quote:
            self._quotes = count + 1
            if self._quotes == 3:
                self._quote, self._buffer, self._quotes = 3 * quote, "", 0
            return True
        self._buffer, self._quotes = "", 0
        if count == 2:  # an empty string
            self._add("STRING")
            return False
        self._quote = quote
        return self._in_string(c)

    def _continues(self, c: str) -> bool:
        b = self._buffer
        if b[0].isdigit():
            return c.isalnum() or c in "._" or (c in "+-" and b[-1] in "eE" and b[:2].lower() != "0x")
        if b[0].isalpha() or b[0] == "_":
            return c.isalnum() or c == "_"
        return b + c in OPERATORS

    def _flush(self) -> None:
        b, self._buffer = self._buffer, ""
        if not b:
            return
        if self._quotes:  # an empty string before a line's end
            self._quotes = 0
            self._add("STRING")
        elif b[0].isdigit():
            signed = self._symbols[-1:] in (["-"], ["+"])
            if signed and (len(self._symbols) == 1 or self._symbols[-2] not in VALUES):
                self._symbols.pop()
            self._add("NUMBER")
        elif b[0].isalpha() or b[0] == "_":
            self._add("CONSTANT" if b in CONSTANTS else b if b in KEYWORDS else "NAME")
        else:
            self._add("CONSTANT" if b == "..." else b)

    def _add(self, symbol: str) -> None:
        symbols = self._symbols
        if symbol == "STRING" and symbols and symbols[-1] == "STRING":
            return  # joined by Python too
        if symbol in CLOSE and self._brackets:
            self._end_element()
            self._brackets.pop()
            if symbols and symbols[-1] == ",":
                symbols.pop()
        elif symbol == "," and self._brackets:
            self._end_element()
            if symbols and symbols[-1] == ",":
                return
        symbols.append(symbol)
        if symbol in OPEN:
            self._brackets.append([len(symbols), None])
        elif symbol == "," and self._brackets:
            self._brackets[-1][0] = len(symbols)

    def _end_element(self) -> None:
        """Leave out the last element of a bracket if it has the shape of the one before."""
        start, before = self._brackets[-1]
        element = self._symbols[start:]
        if element and element == before:
            del self._symbols[start:]
        elif element:
            self._brackets[-1][1] = element

    def _end_line(self) -> None:
        if self._symbols:
            indent = 0 if self._depth else self._columns
            line = Line(tuple(self._symbols), self._depth, indent, self._begin, self._start, not self._brackets)
            self.lines.append(line)
        self._begin_line()
        self._ended = True


def lines_of(text: str) -> list[Line]:
    """The lines of a whole text; the last one needs no newline."""
    lexer = PythonLines()
    lexer.feed(text)
    last = lexer.unfinished()
    return lexer.lines + ([last] if last else [])


def statements(lines: list[Line]) -> list[tuple[str, ...]]:
    """Signatures of statements, whose lines are joined where brackets spread them over several."""
    found: list[tuple[str, ...]] = []
    joined: tuple[str, ...] = ()
    for line in lines:
        joined += line.symbols
        if line.closes:
            found.append(joined)
            joined = ()
    return found + ([joined] if joined else [])
