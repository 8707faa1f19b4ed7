"""The token store: a prepared corpus as flat memory-mapped files with an index and checksums.

A store is a folder: `index.json`, and for each shard NAME.tokens (the tokens of all its documents, each closed by an
end-of-sequence token, little-endian uint16 or uint32) and NAME.docs (int64: the end offset of every document, then the
UTF-8 bytes of every document). The index is written last and atomically: a folder without one is not a store.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSION = 1
MAPPED_SHARDS = 32  # held open at a time: each takes two file descriptors, of which a process often has 1024
INDEX = "index.json"
MAX_INDEX_BYTES = 2**26  # a few hundred thousand shards
MAX_NAME = 240  # bytes: file systems take 255 with the ending
AT_ONCE = 2**22  # tokens looked at together


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest stored type that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_shard(
    folder: Path, name: str, documents: Iterable[tuple[np.ndarray, int]], dtype: np.dtype
) -> dict[str, Any]:
    """Write one shard atomically and return its entry of the index.

    Args:
        documents: the tokens of each document, its end-of-sequence token included, and its UTF-8 bytes.
    """
    ends, sizes, digest, total = [], [], hashlib.sha256(), 0
    temporary = folder / f"{name}.tokens.tmp"
    with open(temporary, "wb") as file:
        for tokens, size in documents:
            data = np.ascontiguousarray(tokens, dtype=dtype).tobytes()
            digest.update(data)
            file.write(data)
            total += len(tokens)
            ends.append(total)
            sizes.append(size)
        _sync(file)
    os.replace(temporary, folder / f"{name}.tokens")
    docs = np.array([ends, sizes], dtype="<i8").tobytes()
    write_atomically(folder / f"{name}.docs", docs)
    return {
        "name": name,
        "tokens": total,
        "documents": len(ends),
        "bytes": sum(sizes),
        "sha256": {"tokens": digest.hexdigest(), "docs": hashlib.sha256(docs).hexdigest()},
    }


def write_index(folder: Path, shards: list[dict[str, Any]], *, tokenizer: dict[str, Any]) -> None:
    """Close a store. `tokenizer` has fingerprint, vocab_size and eos_id."""
    index = {
        "version": VERSION,
        "dtype": token_dtype(tokenizer["vocab_size"]).name,
        "tokenizer": tokenizer,
        "shards": shards,
    }
    write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """The file appears whole, on disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        _sync(file)
    os.replace(temporary, path)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class Shard(NamedTuple):
    """The mapped files of one shard."""

    tokens: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray


class TokenStore:
    """Random access to the documents and tokens of a store, in constant time. Open one with `TokenStore.open`."""

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder = folder
        self.fingerprint = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        self.tokenizer_fingerprint: str = index["tokenizer"]["fingerprint"]
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.eos_id: int = index["tokenizer"]["eos_id"]
        self.shards: list[dict[str, Any]] = [s for s in index["shards"] if s["documents"]]
        self.num_bytes = sum(s["bytes"] for s in self.shards)
        self._dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self._map = lru_cache(MAPPED_SHARDS)(self._open_shard)
        self._sound: set[int] = set()  # shards whose documents have been found to lie where they can
        self._token_starts = [0, *accumulate(s["tokens"] for s in self.shards)]
        self._document_starts = [0, *accumulate(s["documents"] for s in self.shards)]

    @classmethod
    def open(cls, folder: Path | str, verify: bool = False) -> "TokenStore":
        """Open a store and check every file's size; with `verify`, every checksum and every token too.

        Raises:
            ValueError: no store there, a malformed index, or a missing, truncated or altered file, by name. Where
                documents lie in a shard is checked when it is first read: that, too, may raise one.
        """
        folder = Path(folder)
        index = _read_index(folder)
        dtype = np.dtype(index["dtype"])
        for shard in index["shards"]:
            sizes = {"tokens": shard["tokens"] * dtype.itemsize, "docs": shard["documents"] * 16}
            for kind, size in sizes.items():
                path = folder / f"{shard['name']}.{kind}"
                if not path.is_file():
                    raise ValueError(f"{path} is missing: {_REPAIR}")
                if path.stat().st_size != size:
                    raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}: {_REPAIR}")
                if verify and _sha256(path) != shard["sha256"][kind]:
                    raise ValueError(f"{path} was altered (its checksum differs from the index): {_REPAIR}")
        store = cls(folder, index)
        if not store.shards:
            raise ValueError(f"{folder} holds no documents: prepare it from a larger corpus")
        if verify:
            store._check_tokens()
        return store

    @property
    def num_tokens(self) -> int:
        return self._token_starts[-1]

    @property
    def num_documents(self) -> int:
        return self._document_starts[-1]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token stands for, on average; end-of-sequence tokens are counted as tokens."""
        return self.num_bytes / self.num_tokens

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i`, its end-of-sequence token included."""
        s, j = self._locate_document(i)
        shard = self._map(s)
        return shard.tokens[0 if j == 0 else shard.ends[j - 1] : shard.ends[j]]

    def document_bytes(self, i: int) -> int:
        """The UTF-8 bytes of document `i`."""
        s, j = self._locate_document(i)
        return int(self._map(s).sizes[j])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all documents one after the other."""
        parts = []
        while start < stop:
            s = bisect_right(self._token_starts, start) - 1
            end = min(stop, self._token_starts[s + 1])
            parts.append(self._map(s).tokens[start - self._token_starts[s] : end - self._token_starts[s]])
            start = end
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which a document begins, int64, rising."""
        found = []
        for s in range(bisect_right(self._token_starts, start) - 1, len(self.shards)):
            base = self._token_starts[s]
            if base >= stop:
                break
            # a document begins at the shard's start and at every end but the last
            ends = self._map(s).ends
            lo, hi = np.searchsorted(ends, [start - base, stop - base])
            begins = ends[lo : min(hi, len(ends) - 1)] + base
            found.append(begins if start > base else np.concatenate([[base], begins]))
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)

    def _open_shard(self, s: int) -> "Shard":
        shard, path = self.shards[s], self.folder / self.shards[s]["name"]
        try:
            docs = np.memmap(f"{path}.docs", "<i8", "r", shape=(2, shard["documents"]))
            tokens = np.memmap(f"{path}.tokens", self._dtype, "r", shape=(shard["tokens"],))
        except (OSError, ValueError) as error:  # the latter: shorter than when the store was opened
            raise ValueError(f"{path}.tokens and .docs cannot be read ({error}): {_REPAIR}") from error
        ends, sizes = docs
        if s not in self._sound:  # what others wrote must not lead to places outside of the shard
            rising = ends[0] > 0 and bool((ends[1:] > ends[:-1]).all()) and ends[-1] == shard["tokens"]
            if not rising or sizes.min() < 0 or int(sizes.sum()) != shard["bytes"]:
                raise ValueError(f"{path}.docs does not divide its shard into documents: {_REPAIR}")
            self._sound.add(s)
        return Shard(tokens, ends, sizes)

    def _check_tokens(self) -> None:
        for s, shard in enumerate(self.shards):
            tokens = self._map(s).tokens
            for start in range(0, len(tokens), AT_ONCE):
                if (largest := int(tokens[start : start + AT_ONCE].max())) >= self.vocab_size:
                    raise ValueError(
                        f"{self.folder / shard['name']}.tokens has token {largest}, which its tokenizer of "
                        f"{self.vocab_size} tokens does not have: {_REPAIR}"
                    )

    def _locate_document(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        s = bisect_right(self._document_starts, i) - 1
        return s, i - self._document_starts[s]


_REPAIR = "restore it from a copy, or prepare the corpus again with `riverrun data prepare`"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} is not a token store (no {INDEX}): write one with `riverrun data prepare`")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_INDEX_BYTES + 1)
        index: Any = json.loads(content) if len(content) <= MAX_INDEX_BYTES else None
    except (ValueError, RecursionError):  # the latter: lists in lists in lists …
        index = None
    if not _is_index(index):
        raise ValueError(f"{path} is not an index of version {VERSION}, or was altered: {_REPAIR}")
    return index


def _is_index(index: Any) -> bool:
    if not isinstance(index, dict) or index.get("version") != VERSION or index.get("dtype") not in ("uint16", "uint32"):
        return False
    tokenizer, shards = index.get("tokenizer"), index.get("shards")
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("fingerprint"), str):
        return False
    if not _counts(tokenizer, "vocab_size", "eos_id") or tokenizer["eos_id"] >= tokenizer["vocab_size"]:
        return False
    return isinstance(shards, list) and all(map(_is_shard, shards))


def _is_shard(shard: Any) -> bool:
    if not isinstance(shard, dict) or not _counts(shard, "tokens", "documents", "bytes"):
        return False
    name, sums = shard.get("name"), shard.get("sha256")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME:
        return False
    if Path(name).name != name:
        return False  # shards lie in the folder itself
    if not isinstance(sums, dict) or not all(isinstance(sums.get(kind), str) for kind in ("tokens", "docs")):
        return False
    return shard["tokens"] >= shard["documents"]


def _counts(table: dict[str, Any], *names: str) -> bool:
    """Whether these are whole numbers, 0 or more, that a file system can count to."""
    return all(type(table.get(name)) is int and 0 <= table[name] < 2**62 for name in names)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
