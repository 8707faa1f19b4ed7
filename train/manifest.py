"""A checkpoint's manifest.json: the size and SHA-256 of each of its files.

A manifest is read as what it may be, a file that somebody else wrote or damaged: whatever it says, no file outside of
its folder is looked at, and what is wrong with it becomes a message.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "manifest.json"
MAX_BYTES = 2**26  # of the manifest: a few hundred thousand files
MAX_NAME, MAX_PART = 4096, 255  # bytes of a name, and of each of its parts, that file systems take

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What a file is to be like: its size, and its SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


def measure(file: Path) -> Entry:
    """The entry of a file as it is now."""
    with file.open("rb") as opened:
        return Entry(os.fstat(opened.fileno()).st_size, hashlib.file_digest(opened, "sha256").hexdigest())


def write(folder: Path, step: int, files: Mapping[str, Entry]) -> None:
    """Writes the manifest, and waits until it is on disk.

    Args:
        files: by their names relative to `folder`, with forward slashes.
    """
    for name, entry in files.items():
        wrong = _wrong_name(name) or _wrong_entry(asdict(entry))
        assert wrong is None, wrong
    content = {"step": step, "files": {name: asdict(entry) for name, entry in sorted(files.items())}}
    with (folder / NAME).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def entries(folder: Path) -> dict[str, Entry]:
    """The files that a checkpoint is to have, by name. Whether they are there, and intact, only `problem` tells.

    Raises:
        ValueError: there is no manifest, or it is not one, or a name in it leads out of the folder.
    """
    try:
        return _read(folder)
    except _Unreadable as error:
        raise ValueError(f"{error}: restore the checkpoint from a copy, or choose another one") from None


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if all of them are as they were written."""
    try:
        files = _read(folder)
        for name, entry in files.items():
            file = folder / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != entry.bytes:
                return f"{file} has {file.stat().st_size} bytes instead of {entry.bytes}"
        for name, entry in files.items():
            if measure(folder / name).sha256 != entry.sha256:
                return f"{folder / name} does not have the checksum it was written with"
    except _Unreadable as error:
        return str(error)
    except OSError as error:
        return f"the files of {folder} cannot be read ({error})"
    return None


class _Unreadable(Exception):
    """A manifest that is none; the message begins with its path and says why."""


def _read(folder: Path) -> dict[str, Entry]:
    manifest = folder / NAME

    def refuse(why: object) -> _Unreadable:
        return _Unreadable(f"{manifest} cannot be read ({why})")

    try:
        if not manifest.is_file():  # and not, say, a pipe that would be waited for
            raise refuse("there is no such file")
        if not _stays_within(folder, NAME):
            raise refuse("it is a link that leads out of the checkpoint")
        with manifest.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise refuse(f"it has more than {MAX_BYTES} bytes")
        value = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:  # the last: lists in lists in lists …
        raise refuse(error) from None
    files = value.get("files") if isinstance(value, dict) else None
    if not isinstance(files, dict) or not files:
        raise refuse("it has no table `files`")
    for name, entry in files.items():
        if (wrong := _wrong_name(name) or _wrong_entry(entry)) is not None:
            raise refuse(f"of {name[:80]!r}: {wrong}")
        if not _stays_within(folder, name):
            raise refuse(f"of {name[:80]!r}: a link leads out of the checkpoint")
    return {name: Entry(entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def _wrong_name(name: str) -> str | None:
    """Why a name is not that of a file below the folder."""
    if "\\" in name or not name.isprintable():
        return "a name has neither backslashes nor characters that cannot be printed"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "a name is relative and stays within the checkpoint"
    if len(name.encode()) > MAX_NAME or any(len(part.encode()) > MAX_PART for part in parts):
        return "no file can have such a long name"
    return None


def _wrong_entry(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return "a file has a table with its bytes and sha256"
    size, digest = entry.get("bytes"), entry.get("sha256")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        return "`bytes` is a whole number, 0 or more"
    if not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
        return "`sha256` is 64 hexadecimal digits"
    return None


def _stays_within(folder: Path, name: str) -> bool:
    """Whether the file is below the folder once links are followed."""
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(os.path.join(root, name))]) == root
