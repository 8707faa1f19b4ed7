"""Where documents come from: text files, JSON lines, Parquet, or a `datasets` name, cut into pieces of similar size.

The pieces are a function of the input alone. A source is sent to worker processes whole; each reads the pieces it is
given.
"""

import errno
import glob as globs
import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

FORMATS = ("auto", "text", "jsonl", "parquet", "hub")
MIN_PIECE_BYTES, MAX_PIECES = 2**21, 2000
ROWS_AT_ONCE = 256

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}


Span = tuple[Path, int, int]  # a file, and the bytes [start, stop) of it


@dataclass(frozen=True)
class Skipped:
    """A document that is not used, and why."""

    reason: str
    where: str


class Source(ABC):
    """Attributes:
    identity: plain values that change when the documents may have changed.
    sizes: bytes of each piece, for the progress bar.
    """

    identity: dict[str, Any]
    sizes: list[int]

    @abstractmethod
    def documents(self, piece: int) -> Iterator[str | Skipped]:
        """The documents of a piece, in order."""


class TextFiles(Source):
    """Each file is one document, as it is: UTF-8, line ends kept. Files in another encoding are skipped."""

    def __init__(self, files: Sequence[Path], piece_bytes: int | None = None):
        spans = [(path, 0, path.stat().st_size) for path in files]
        self.identity = files_identity("text", files)
        self._pieces = group(spans, piece_bytes or default_piece_bytes(sum(size for _, _, size in spans)))
        self.sizes = [sum(size for _, _, size in piece) for piece in self._pieces]

    def documents(self, piece: int) -> Iterator[str | Skipped]:
        for path, _, size in self._pieces[piece]:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from error
            check_unchanged(path, len(data), size)
            try:
                yield data.decode() or Skipped("empty", str(path))
            except UnicodeDecodeError as error:
                yield Skipped("not UTF-8", f"{path} (byte {error.start})")


class Rows(Source):
    """One text column of a `datasets.Dataset`; each row is a document."""

    def __init__(self, dataset: Any, field: str, name: str, identity: dict[str, Any], piece_bytes: int | None = None):
        if field not in dataset.column_names:
            raise no_field(name, field, dataset.column_names)
        kind = getattr(dataset.features[field], "dtype", None)
        if kind not in ("string", "large_string", "string_view", "null"):
            raise ValueError(
                f"the field {field!r} of {name} holds {kind or 'nested values'}, not text: choose another --field"
            )
        self._dataset = dataset.select_columns([field]).with_format("arrow")
        self._name, self.identity = name, {**identity, "field": field}
        total, rows = max(1, self._dataset.data.nbytes), len(dataset)
        self._rows_per_piece = max(1, rows * (piece_bytes or default_piece_bytes(total)) // total)
        starts = range(0, rows, self._rows_per_piece)
        self.sizes = [total * (min(start + self._rows_per_piece, rows) - start) // rows for start in starts]

    def documents(self, piece: int) -> Iterator[str | Skipped]:
        first = piece * self._rows_per_piece
        last = min(first + self._rows_per_piece, len(self._dataset))
        for start in range(first, last, ROWS_AT_ONCE):
            column = self._dataset[start : min(start + ROWS_AT_ONCE, last)].column(0)
            for row, value in enumerate(column, start):
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    yield Skipped("not UTF-8", f"{self._name} (row {row})")
                    continue
                yield text or Skipped("no text" if text is None else "empty", f"{self._name} (row {row})")


def open_source(
    inputs: Sequence[str | Path],
    *,
    format: str = "auto",
    field: str = "text",
    glob: str = "*",
    subset: str | None = None,
    split: str = "train",
    cache: Path | None = None,
    piece_bytes: int | None = None,
) -> Source:
    """Find and open the input.

    Args:
        inputs: files, folders (searched at every depth, hidden names left out) or patterns; or one hub name.
        format: one of FORMATS; "auto" goes by the files' names and is text unless they say otherwise.
        field: the column that holds the text.
        glob: which names count in folders.
        subset, split: of a hub data set.
        cache: where the field is unpacked to from Parquet; None: the cache of `datasets`. A hub data set goes there.

    Raises:
        ValueError: nothing found, files of several formats, a missing field, or unreadable files.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is none of {', '.join(FORMATS)}")
    if format == "hub":
        if len(inputs) != 1:
            raise ValueError("give one hub name at a time: prepare several data sets into several stores and mix them")
        name = str(inputs[0])
        dataset = _load(name, name=subset, split=split)
        identity = {"format": "hub", "name": name, "subset": subset, "split": split, "data": dataset._fingerprint}
        return Rows(dataset, field, name, identity, piece_bytes)
    files = find_files(inputs, glob)
    if format == "auto":
        kinds = {kind: file for file in reversed(files) for kind in [_format_of(file)]}
        if len(kinds) > 1:
            found = ", ".join(f"{kind} ({file})" for kind, file in sorted(kinds.items()))
            raise ValueError(f"the input has files of several formats: {found}. Choose with --glob or --format")
        format = next(iter(kinds))
    if format == "text":
        return TextFiles(files, piece_bytes)
    for file in files:
        _check_readable(file)
    names = f"{files[0]}" if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{names}: no data in there")
    if format == "jsonl":
        from riverrun.train.data.jsonl import JsonLines

        return JsonLines(files, field, piece_bytes)
    for file in files:
        _check_parquet(file, field)
    paths = [str(file) for file in files]
    dataset = _load(
        "parquet", what=names, data_files=paths, columns=[field], split="train",
        cache_dir=str(cache) if cache else None,
    )  # fmt: skip
    return Rows(dataset, field, names, files_identity(format, files), piece_bytes)


def find_files(inputs: Sequence[str | Path], glob: str = "*") -> list[Path]:
    """The files that `inputs` stand for, each once, those of a folder or pattern in the order of their names.

    Raises:
        ValueError: an input that stands for nothing.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            matches = sorted(_walk(path, glob))
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(p) for p in globs.glob(str(path), recursive=True) if os.path.isfile(p))
            if not matches:
                raise ValueError(
                    f"there is no file, folder or pattern {given}: check the path (a name on the Hugging Face hub "
                    "needs --format hub)"
                )
        if not matches:
            raise ValueError(f"the folder {given} has no files named {glob}: check --glob")
        found |= dict.fromkeys(Path(os.path.abspath(match)) for match in matches)
    if not found:
        raise ValueError("no input was given: name files, folders or a hub data set")
    return list(found)


def draw_documents(source: Source, max_bytes: int) -> Iterator[str]:
    """About `max_bytes` of a source, or all of it: documents drawn by their content, in order. The share is taken of
    the files' sizes: of compressed files, the text is several times as long."""
    share = min(1.0, max_bytes / max(1, sum(source.sizes)))
    for piece in range(len(source.sizes)):
        for text in source.documents(piece):
            if not isinstance(text, Skipped) and position(text.encode(), "draw") < share:
                yield text


def position(document: bytes, key: object) -> float:
    """A number in [0, 1) that depends on a document's content and the key alone."""
    digest = hashlib.sha256(f"{key}\0".encode() + document).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def default_piece_bytes(total: int) -> int:
    return max(MIN_PIECE_BYTES, -(-total // MAX_PIECES))


def check_unchanged(path: Path, size: int, planned: int) -> None:
    """The pieces were cut for a file of the planned size."""
    if size != planned:
        raise ValueError(f"{path} changed while it was being prepared: remove the output folder and start again")


def group(spans: Sequence[Span], limit: int) -> list[list[Span]]:
    """Neighbours together, up to `limit` bytes a group; a larger one stays alone."""
    groups: list[list[Span]] = []
    filled = 0
    for path, start, stop in spans:
        if not groups or filled + stop - start > limit:
            groups.append([])
            filled = 0
        groups[-1].append((path, start, stop))
        filled += stop - start
    return groups


def _walk(folder: Path, glob: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and fnmatch(name, glob) and path.is_file():
                yield path


def _format_of(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def files_identity(format: str, files: Sequence[Path]) -> dict[str, Any]:
    """The files' names, sizes and times of change, in short."""
    digest, total = hashlib.sha256(), 0
    for file in files:
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        total += stat.st_size
    return {"format": format, "files": len(files), "bytes": total, "data": digest.hexdigest()}


def _check_readable(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


def _check_parquet(file: Path, field: str) -> None:
    """Each file has the field: `datasets` would only tell that they differ, and not which one."""
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(file).names
    except Exception as error:  # pyarrow raises several types for a damaged file
        raise ValueError(f"cannot read {file}: {str(error).splitlines()[0]}") from error
    if field not in names:
        raise no_field(str(file), field, names)


def no_field(name: str, field: str, others: Sequence[str]) -> ValueError:
    return ValueError(f"{name} has no field {field!r}: choose one with --field out of {', '.join(others)}")


def _load(path: str, what: str | None = None, **options: Any) -> Any:
    import datasets

    quiet = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, **options)
    except Exception as error:  # datasets wraps whatever pyarrow, the hub or the file system raise
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        for cause in causes:
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise cause from error
        explanation = (str(causes[-1]).strip() or type(causes[-1]).__name__).splitlines()[0]
        raise ValueError(f"cannot read {what or path}: {explanation}") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
