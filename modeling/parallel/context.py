"""Context parallelism: every row of a batch cut into contiguous shards, one a rank, and what joins them.

Documents may begin anywhere and go over any number of shards. Every rank knows the documents of the whole rows, so that
all agree on what is exchanged without asking each other.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from riverrun.modeling.parallel.collectives import all_gather, depend
from riverrun.modeling.parallel.mesh import Axis

Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Context:
    """How this rank's shard of B rows hangs together with the other ranks'.

    The shard is seen as the ops see a packed batch: (1, B·T, …) tokens with `cu_seqlens`, T tokens of each row; or, if
    no document begins within any of its rows, as (B, T, …) with `cu_seqlens` None. Its sequences are its pieces of
    documents. A row's first piece may go on with a document of the shard before, its last piece be gone on with.

    Attributes:
        axis: the ranks that share the rows.
        shape: (B, T) of this rank's shard.
        cu_seqlens: (S + 1,) int32 bounds of its S pieces of documents, on the device, or None.
        first, last: (B,) int64, which of the S pieces is the first and which the last of each row.
        joins: joins[r][b]: the first token of shard r of row b belongs to the document that shard r − 1 ends with.
        passes: passes[r][b]: shard r of row b joins, and nothing but that document is in it.
        row_seqlens: (D + 1,) int32 bounds of the documents of the B whole rows, T · size tokens each, on the device.
        bounds: the same on the host.
        row_bounds: `row_seqlens` if any document begins inside a row, else None: the whole rows as an op sees a batch.
        tail_tokens: (N,) int64 the places, among the B·T tokens, of every row's last piece; None: of all tokens.
        tail_seqlens: (B + 1,) int32 bounds of those pieces among the N tokens; None if `tail_tokens` is.
        first_of_last: (B,) int64 where in its row of the shard each row's last piece begins; None if `tail_tokens` is.
        last_pieces: (begin, end) of every row's last piece among the B·T tokens, on the host.
        longest_tail: tokens of the longest piece, of any rank's, that a document of the next shard goes on with.
        linear: how linear recurrences share rows: by "states" that are handed on, by "heads" that are moved, or "auto":
            whichever moves fewer bytes.
        attention: how attention does: by "ulysses", which moves heads, "ring", which passes keys round, or "auto":
            heads if they divide.
    """

    axis: Axis
    shape: tuple[int, int]
    cu_seqlens: torch.Tensor | None
    first: torch.Tensor
    last: torch.Tensor
    joins: tuple[tuple[bool, ...], ...]
    passes: tuple[tuple[bool, ...], ...]
    row_seqlens: torch.Tensor
    bounds: tuple[int, ...]
    row_bounds: torch.Tensor | None
    tail_tokens: torch.Tensor | None
    tail_seqlens: torch.Tensor | None
    first_of_last: torch.Tensor | None
    last_pieces: tuple[tuple[int, int], ...]
    longest_tail: int
    linear: str
    attention: str

    @classmethod
    def of_rows(
        cls,
        axis: Axis,
        rows: int,
        length: int,
        cu_seqlens: Sequence[int],
        device: torch.device | str,
        linear: str = "auto",
        attention: str = "auto",
    ) -> "Context":
        """This rank's part of `rows` rows of `length` tokens.

        Args:
            cu_seqlens: on the host: the bounds of the documents over the rows × length tokens; row starts are bounds.

        Raises:
            ValueError: the length does not divide among the ranks.
        """
        if length % axis.size:
            raise ValueError(
                f"rows of {length} tokens do not divide into parallel.cp={axis.size} shards: "
                f"set data.seq_len to a multiple of {axis.size}"
            )
        T = length // axis.size
        starts = set(cu_seqlens)
        assert all(b * length in starts for b in range(rows + 1)), "row starts must be bounds"

        def begins(b: int, r: int) -> int:
            return b * length + r * T

        def tail_length(b: int, r: int) -> int:
            """Tokens of the piece that ends where shard r of row b begins."""
            place = bisect_left(cu_seqlens, begins(b, r))
            return begins(b, r) - max(cu_seqlens[place - 1], begins(b, r - 1))

        within = [[False] * rows for _ in range(axis.size)]  # a document begins after the shard's first token
        for start in cu_seqlens[:-1]:
            b, place = divmod(start, length)
            within[place // T][b] |= place % T != 0
        joins = [[begins(b, r) not in starts for b in range(rows)] for r in range(axis.size)]
        passes = [[j and not w for j, w in zip(*row)] for row in zip(joins, within)]

        bounds: list[int] = []
        first, last = [], []
        for b in range(rows):
            begin = begins(b, axis.rank)
            inner = [s - begin + b * T for s in cu_seqlens if begin < s < begin + T]
            first.append(len(bounds))
            bounds += [b * T, *inner]
            last.append(len(bounds) - 1)
        bounds.append(rows * T)

        def ints(values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        whole = len(bounds) == rows + 1
        tail_tokens = tail_seqlens = first_of_last = None
        if not whole:
            pieces = [range(bounds[i], bounds[i + 1]) for i in last]
            tail_tokens = ints([token for piece in pieces for token in piece])
            sizes = torch.tensor([0, *map(len, pieces)]).cumsum(0)
            tail_seqlens = ints(sizes.tolist(), torch.int32)
            first_of_last = ints([piece.start % T for piece in pieces])
        row_seqlens = ints(cu_seqlens, torch.int32)
        return cls(
            axis,
            (rows, T),
            None if whole else ints(bounds, torch.int32),
            ints(first),
            ints(last),
            tuple(map(tuple, joins)),
            tuple(map(tuple, passes)),
            row_seqlens,
            tuple(cu_seqlens),
            None if len(cu_seqlens) == rows + 1 else row_seqlens,
            tail_tokens,
            tail_seqlens,
            first_of_last,
            tuple((bounds[i], bounds[i + 1]) for i in last),
            max((tail_length(b, r) for r in range(1, axis.size) for b in range(rows) if joins[r][b]), default=0),
            linear,
            attention,
        )

    @property
    def connected(self) -> bool:
        """Whether any document crosses from a shard to the next, of any rank: if not, nothing need be exchanged."""
        return any(any(row) for row in self.joins)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(end - begin for begin, end in pairwise(self.bounds))

    def takes_heads(self, heads: int, cheaper: bool) -> bool:
        """Whether a linear recurrence of that many heads is to move them, where `cheaper` says what "auto" would.

        Raises:
            ValueError: `linear` is "heads", and they do not divide among the ranks.
        """
        if self.linear == "heads" and heads % self.axis.size:
            raise ValueError(
                f"parallel.linear='heads' cannot share {heads} heads among parallel.cp={self.axis.size} ranks: "
                "use parallel.linear='states'"
            )
        return self.linear == "heads" or (self.linear == "auto" and cheaper)

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        """What the end of the shard depends on: x (B, T, …) as it is if the rows are whole, else of (1, B·T, …) the
        tokens of each row's last piece, (1, N, …) with bounds `tail_seqlens`."""
        return x if self.tail_tokens is None else x.index_select(1, self.tail_tokens)

    def recent(self, x: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `tail`, but no more than `limit` tokens of each piece; and their bounds as an op takes them."""
        T = self.shape[1]
        if self.tail_tokens is None:
            return x[:, max(0, T - limit) :].contiguous(), None
        pieces = [range(max(begin, end - limit), end) for begin, end in self.last_pieces]
        tokens = torch.tensor([token for piece in pieces for token in piece])
        bounds = torch.tensor([0, *map(len, pieces)]).cumsum(0).to(torch.int32)
        tokens, bounds = (t.to(x.device, non_blocking=True) for t in (tokens, bounds))
        return x.index_select(1, tokens), bounds

    def initial(self, incoming: torch.Tensor) -> torch.Tensor:
        """The rows' incoming states (B, …) → the initial states of all pieces (S, …), zeros where a document begins."""
        if self.cu_seqlens is None:
            return incoming
        states = incoming.new_zeros(len(self.cu_seqlens) - 1, *incoming.shape[1:])
        return states.index_copy(0, self.first, incoming)

    def mask(self, flags: Sequence[bool], like: torch.Tensor) -> torch.Tensor:
        """(B,) flags that broadcast against `like` (B, …)."""
        return torch.tensor(flags, device=like.device).view(-1, *(1,) * (like.dim() - 1))

    @property
    def chain(self) -> int:
        """How many shards in a row, at most, a state passes through on its way to another: what enters the shard after
        them depends on what entered the first."""
        longest = 0
        for row in zip(*self.passes[:-1]):
            run = 0
            for passed in row:
                run = run + 1 if passed else 0
                longest = max(longest, run)
        return longest

    def incoming(self, added: torch.Tensor, transfer: torch.Tensor | None, apply: Apply = torch.mul) -> torch.Tensor:
        """The states (B, …) that enter this shard, of an affine recurrence; one gathering each way.

        Args:
            added: (B, …) the states at the ends of the rows' last pieces when each begins with zeros, in float32.
            transfer: (B, …) how such a state depends on the one before the piece: state = apply(transfer, before) +
                added. It counts only where the piece is the whole shard, so never if `chain` is 0; None: not at all.
        """
        numbers = added[0].numel()
        both = [added.flatten(1)] + ([transfer.flatten(1).to(added.dtype)] if transfer is not None else [])
        gathered = all_gather(torch.cat(both, dim=1)[None], self.axis)  # (size, B, numbers of both)
        parts = gathered[..., :numbers].unflatten(-1, added.shape[1:])
        state = torch.zeros_like(added)
        for r in range(self.axis.rank):
            passed = None
            if transfer is not None and any(self.passes[r]):
                passed = apply(gathered[r, :, numbers:].unflatten(-1, transfer.shape[1:]), state)
                passed = torch.where(self.mask(self.passes[r], passed), passed, 0)
            state = parts[r] if passed is None else parts[r] + passed
        state = torch.where(self.mask(self.joins[self.axis.rank], state), state, 0)
        return depend(state, gathered)  # on the first rank too: the gathering's backward pass is a collective
