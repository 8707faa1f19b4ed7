"""Fixed-length rows cut from a store's documents laid end to end, with the documents' bounds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from riverrun.train.data.store import TokenStore

IGNORED = -100  # a target that has no loss


@dataclass(frozen=True)
class Row:
    """One row of T tokens.

    Attributes:
        input_ids: (T,) int64.
        targets: (T,) int64, the next token of the same document; IGNORED at a document's last token.
        starts: positions > 0 in the row at which a document begins.
        begins: a document begins at position 0 too: the row does not go on with one of the row before.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    begins: bool = True


@dataclass(frozen=True)
class Batch:
    """A micro batch of B rows of T tokens.

    Attributes:
        input_ids: (B, T) int64.
        targets: (B, T) int64, IGNORED where there is no loss.
        cu_seqlens: (S + 1,) int32 bounds of the sequences in the flattened B·T tokens; rows begin sequences.
        num_targets: targets that have a loss.
        extra: what else an objective needs, (B, T) each.
        carries: (B,) bool, on the CPU: rows that go on from a state (see `riverrun.train.state_passing`); None: none.
        num_steps: iterations of a recurrent-depth model without gradient and with it; None: as the model has it.
        row_keys: (B,) int64 what a model draws from for each of its rows (see `riverrun.train.recurrence`); None: it
            draws nothing.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    num_targets: int
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    carries: torch.Tensor | None = None
    num_steps: tuple[int, int] | None = None
    row_keys: torch.Tensor | None = None

    def shard(self, tokens: slice) -> "Batch":
        """Some tokens of every row; the bounds stay those of whole rows, and so does the number of targets."""
        extra = {name: value[:, tokens] for name, value in self.extra.items()}
        return replace(self, input_ids=self.input_ids[:, tokens], targets=self.targets[:, tokens], extra=extra)

    def to(self, device: torch.device | str) -> "Batch":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        extra = {name: move(value) for name, value in self.extra.items()}
        ids, targets, cu_seqlens = move(self.input_ids), move(self.targets), move(self.cu_seqlens)
        keys = None if self.row_keys is None else move(self.row_keys)
        return replace(self, input_ids=ids, targets=targets, cu_seqlens=cu_seqlens, extra=extra, row_keys=keys)


class PackedRows:
    """A store as rows of `seq_len` tokens; row i covers tokens [i · seq_len, (i + 1) · seq_len) of the corpus.

    A row sees one token more than it holds, the target of its last one; the corpus's last, incomplete row is dropped.

    Raises:
        ValueError: a store shorter than one row.
    """

    def __init__(self, store: TokenStore, seq_len: int):
        self.store, self.seq_len = store, seq_len
        self.num_rows = (store.num_tokens - 1) // seq_len
        if self.num_rows < 1:
            raise ValueError(
                f"{store.folder} holds {store.num_tokens} tokens, less than one row of data.seq_len={seq_len}: "
                "prepare a larger corpus or shorten the rows"
            )

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> Row:
        start = i * self.seq_len
        tokens = self.store.tokens(start, start + self.seq_len + 1).astype(np.int64)
        starts = self._starts(i)
        targets = tokens[1:].copy()
        targets[starts - 1] = IGNORED  # the token before a document's first does not predict it
        begins = len(self.store.document_starts(start, start + 1)) > 0
        return Row(tokens[:-1], targets, starts[starts < self.seq_len], begins)

    def pairs(self, i: int) -> int:
        """The squared lengths of row i's documents, summed: what attention costs in it, to a constant factor."""
        lengths = np.diff(self._starts(i), prepend=0, append=self.seq_len)
        return int((lengths**2).sum())

    def _starts(self, i: int) -> np.ndarray:
        """Where documents begin within (0, seq_len] of row i."""
        start = i * self.seq_len
        return self.store.document_starts(start + 1, start + self.seq_len + 1) - start


def collate(rows: Sequence[Row]) -> Batch:
    """Rows of equal length as one micro batch."""
    length = len(rows[0].input_ids)
    bounds = [np.concatenate([[0], row.starts]) + i * length for i, row in enumerate(rows)]
    cu_seqlens = np.concatenate([*bounds, [len(rows) * length]]).astype(np.int32)
    targets = np.stack([row.targets for row in rows])
    return Batch(
        torch.from_numpy(np.stack([row.input_ids for row in rows])),
        torch.from_numpy(targets),
        torch.from_numpy(cu_seqlens),
        int((targets != IGNORED).sum()),
    )
