"""Files of one JSON line a finished piece of work, which a killed run goes on with."""

from pathlib import Path

from riverrun.train.data.store import write_atomically


def whole_lines(path: Path) -> list[bytes]:
    """The lines of `path`, none if it is missing. A last one that was cut short, when what wrote it was killed, is
    removed."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomically(path, whole)
    return whole.splitlines()
