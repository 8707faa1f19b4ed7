"""JSON lines, read where they lie: each line is an object, one field of it the document.

Nothing but that field is interpreted: other fields may come, go and change their type from line to line.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from riverrun.train.data.sources import (
    Skipped,
    Source,
    Span,
    check_unchanged,
    default_piece_bytes,
    files_identity,
    group,
    no_field,
)

_EXPECTED = "Each line must be one JSON object (jq -c '.[]' turns a JSON array into such lines)"
SAMPLE = 256  # lines that are looked at before the work begins
BOM = b"\xef\xbb\xbf"


class JsonLines(Source):
    """One text field of JSON lines; each line is a document. Large files are cut into ranges of bytes, and a line
    belongs to the range in which it begins; compressed files stay whole.

    Raises:
        ValueError: a file that cannot be read, is not JSON lines, or (in its first lines) lacks the field; a field that
            is not text. File and line are named.
    """

    def __init__(self, files: Sequence[Path], field: str, piece_bytes: int | None = None):
        self._field = field
        self.identity = {**files_identity("jsonl", files), "field": field}
        self._file_sizes = {path: _size(path) for path in files}
        limit = piece_bytes or default_piece_bytes(sum(self._file_sizes.values()))
        spans: list[Span] = []
        for path, size in self._file_sizes.items():
            step = max(1, size) if is_compressed(path) else limit
            spans += [(path, start, min(start + step, size)) for start in range(0, size, step)]
        self._pieces = group(spans, limit)
        self.sizes = [sum(stop - start for _, start, stop in piece) for piece in self._pieces]
        for path in files:
            self._check_field(path)

    def documents(self, piece: int) -> Iterator[str | Skipped]:
        for path, start, stop in self._pieces[piece]:
            where = _Where(path, start)
            check_unchanged(path, _size(path), self._file_sizes[path])
            for where.index, line in enumerate(_lines(path, start, stop)):
                if line.strip():
                    yield self._text(line, where)

    def _text(self, line: bytes, where: "_Where") -> str | Skipped:
        try:
            decoded = line.decode()
        except UnicodeDecodeError:
            return Skipped("not UTF-8", str(where))
        text = _object(decoded, where).get(self._field)
        if text is None:
            return Skipped("no text", str(where))
        if not isinstance(text, str):
            raise ValueError(
                f"the field {self._field!r} of {where} holds {type(text).__name__}, not text: choose another --field"
            )
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as in "\ud800"
            return Skipped("not UTF-8", str(where))
        return text or Skipped("empty", str(where))

    def _check_field(self, path: Path) -> None:
        """The field is in one of the file's first lines, if there are any, and those are well-formed."""
        names: dict[str, None] = {}
        where = _Where(path, 0)
        for where.index, line in enumerate(islice(_lines(path, 0, self._file_sizes[path]), SAMPLE)):
            if line.strip() and not isinstance(self._text(line, where), Skipped):
                return
            if line.strip():
                names |= dict.fromkeys(_object(line.decode(errors="replace"), where))
        if names and self._field not in names:
            raise no_field(str(path), self._field, list(names))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in _OPENERS


class _Where:
    """A line's place, as "FILE (line N)"; the lines before a range are counted only if somebody asks."""

    def __init__(self, path: Path, start: int):
        self._path, self._start, self._before = path, start, -1
        self.index = 0

    def __str__(self) -> str:
        if self._before < 0:
            # those that begin before the range's start
            self._before = sum(1 for _ in _lines(self._path, 0, self._start)) if self._start else 0
        return f"{self._path} (line {self._before + self.index + 1})"


def _lines(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin at a byte in [start, stop); all lines of a compressed file."""
    try:
        with _open(path) as file:
            if is_compressed(path):
                yield from file
                return
            if start:
                file.seek(start - 1)
                start += len(file.readline()) - 1  # the rest of a line that begins before
            while start < stop and (line := file.readline()):
                start += len(line)
                yield line.removeprefix(BOM)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _object(line: str, where: _Where) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {where}: not JSON ({error}). {_EXPECTED}") from error
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {where}: a JSON {type(value).__name__} and not an object. {_EXPECTED}")
    return value


def _open(path: Path) -> IO[bytes]:
    return _OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _open_zstd(path: Path, mode: str) -> Any:
    import io

    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), mode), "zstd"))


_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
