"""Where the command line prints: `out` for results, `err` for messages, and how a failure is told."""

import errno
import json
import os
import sys
import time
from unicodedata import category

from rich.console import Console
from rich.text import Text

GRACE = 5.0  # seconds

out = Console()
err = Console(stderr=True)

_FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota used up", errno.EROFS: "the file system is read-only"}
_NAMES = {errno.ENAMETOOLONG: "the name is too long", errno.ELOOP: "links that lead round in a circle"}
_OS_ERRORS = {
    FileNotFoundError: "no such file or folder",
    PermissionError: "no permission to read or write",
    IsADirectoryError: "this is a folder, but a file is needed",
    NotADirectoryError: "this is a file, but a folder is needed",
    FileExistsError: "this exists already",
}


def traceback_wanted() -> bool:
    """RIVERRUN_TRACEBACK=1: show where user errors were raised."""
    return os.environ.get("RIVERRUN_TRACEBACK", "") not in ("", "0")


def user_message(error: BaseException) -> str | None:
    """What to tell the user of an error that the user can mend; None for a defect of the program."""
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return f"{_FULL[error.errno]}{_where(error)}: free some space or write elsewhere; what was saved is intact"
        if error.errno is None:  # raised with a message of its own, as transformers does for a model it cannot find
            return str(error)
        meaning = next((words for kind, words in _OS_ERRORS.items() if isinstance(error, kind)), None)
        meaning = meaning or _NAMES.get(error.errno)
        return meaning and f"{meaning}{_where(error)}: check the path"
    return str(error) if isinstance(error, ValueError) and not isinstance(error, UnicodeError) else None


def print_error(message: str) -> None:
    """A short red message on stderr, from rank 0 only; torchrun is told on every rank, and shows the first failure."""
    _tell_torchrun(message)
    if int(os.environ.get("RANK", "0")) == 0:
        err.print(Text.assemble(("error: ", "bold red"), (printable(message), "red")), soft_wrap=True)
    else:
        time.sleep(GRACE)  # torchrun stops all ranks once one is gone: the first one is to have said why


def printable(text: str) -> str:
    """Text whose control characters are written out: names and values that others chose must not steer a terminal."""

    def steers(character: str) -> bool:
        return category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t"

    return "".join(c.encode("unicode_escape").decode() if steers(c) else c for c in text)


def _where(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f" ({' and '.join(names)})" if names else ""


def _tell_torchrun(message: str) -> None:
    """Write the message into the file from which torchrun's summary takes it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    except OSError as error:  # the message itself must still be printed
        print(f"cannot write torchrun's error file {path}: {error}", file=sys.stderr)
