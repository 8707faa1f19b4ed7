"""Documents as batches for evaluation: cut in segments, then packed into rows, or one a row."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from riverrun.train.data.packing import IGNORED

Tokens = Sequence[int] | np.ndarray


class Batch(NamedTuple):
    """What `evaluate` reads; a plain tuple of the first three will do.

    Attributes:
        input_ids: (B, T) int64.
        targets: (B, T) int64 the token to predict at each position, IGNORED where there is no loss.
        cu_seqlens: (S + 1,) int32 bounds of the sequences over the flattened B·T tokens; None: a row is a sequence.
        documents: (S,) int64 the document that each sequence is part of; None: each is a document of its own.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    documents: np.ndarray | None = None


def segments(documents: Iterable[Tokens], seq_len: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the document, up to seq_len + 1 tokens): each document cut so that every token but its first is
    predicted once. Documents of a single token yield nothing."""
    for number, tokens in enumerate(documents):
        for start in range(0, len(tokens) - 1, seq_len):
            yield number, np.asarray(tokens[start : start + seq_len + 1], np.int64)


def packed_batches(documents: Iterable[Tokens], seq_len: int, batch_size: int) -> Iterator[Batch]:
    """Segments of documents packed into rows of `seq_len` (first fit), for models that keep sequences apart."""
    rows: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(batch_size)]
    room = [seq_len] * batch_size
    for number, tokens in segments(documents, seq_len):
        if max(room) < len(tokens) - 1:
            yield _pack([row for row in rows if row], seq_len)
            rows, room = [[] for _ in range(batch_size)], [seq_len] * batch_size
        place = next(i for i, free in enumerate(room) if free >= len(tokens) - 1)
        rows[place].append((number, tokens))
        room[place] -= len(tokens) - 1
    if any(rows):
        yield _pack([row for row in rows if row], seq_len)


def row_batches(documents: Iterable[Tokens], seq_len: int, batch_size: int) -> Iterator[Batch]:
    """One segment a row, padded on the right (which no causal model can see), for any model."""
    for group in batched(segments(documents, seq_len), batch_size):
        width = max(len(tokens) - 1 for _, tokens in group)
        input_ids, targets = pad([(tokens[:-1], tokens[1:]) for _, tokens in group], width)
        yield Batch(input_ids, targets, None, np.array([number for number, _ in group]))


def _pack(rows: list[list[tuple[int, np.ndarray]]], seq_len: int) -> Batch:
    bounds, documents, pairs = [0], [], []
    for index, row in enumerate(rows):
        for number, tokens in row:
            bounds.append(bounds[-1] + len(tokens) - 1)
            documents.append(number)
        if bounds[-1] < (index + 1) * seq_len:  # padding is a sequence without targets
            bounds.append((index + 1) * seq_len)
            documents.append(0)
        pairs.append((np.concatenate([t[:-1] for _, t in row]), np.concatenate([t[1:] for _, t in row])))
    input_ids, targets = pad(pairs, seq_len)
    return Batch(input_ids, targets, torch.tensor(bounds, dtype=torch.int32), np.array(documents))


def pad(pairs: list[tuple[np.ndarray, np.ndarray]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (inputs, targets) to the same width; any token will do after a row's end."""
    input_ids, targets = np.zeros((len(pairs), width), np.int64), np.full((len(pairs), width), IGNORED)
    for row, (given, wanted) in enumerate(pairs):
        input_ids[row, : len(given)] = given
        targets[row, : len(wanted)] = wanted
    return torch.from_numpy(input_ids), torch.from_numpy(targets)


def batched(items: Iterable, size: int) -> Iterator[list]:
    group: list = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
