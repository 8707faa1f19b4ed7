"""Context parallelism: every row of a batch cut into contiguous shards, one a rank, and what joins them.

Documents may begin anywhere and go over any number of shards. Every rank knows the documents of the whole rows, so that
all agree on what is exchanged without asking each other.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from riverrun.modeling.parallel.collectives import all_gather, depend, pass_on, shift, with_end
from riverrun.modeling.parallel.mesh import Axis

Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Context:
    """How this rank's shard of B rows hangs together with the other ranks'.

    The shard is seen as the ops see a packed batch: (1, B·T, …) tokens with `cu_seqlens`, T tokens of each row; or, if
    no document begins within any of its rows, as (B, T, …) with `cu_seqlens` None. Its sequences are its pieces of
    documents. A row's first piece may go on with a document of the shard before, its last piece be gone on with.

    What every rank must know alike follows from `bounds`, on the host; what ops need lies on the device, and is made
    when it is first asked for.

    Attributes:
        axis: the ranks that share the rows.
        shape: (B, T) of this rank's shard.
        bounds: of the documents over the B · T · size tokens of the whole rows, on the host; row starts are bounds.
        device: where this rank computes.
        linear: how linear recurrences share rows: by "states" that are handed on, by "heads" that are moved, or "auto":
            whichever moves fewer bytes.
        attention: how attention does: by "ulysses", which moves heads, "ring", which passes keys round, or "auto":
            heads if they divide.
    """

    axis: Axis
    shape: tuple[int, int]
    bounds: tuple[int, ...]
    device: torch.device
    linear: str = "auto"
    attention: str = "auto"

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
        """This rank's part of `rows` rows of `length` tokens, of which the documents have the given bounds.

        Raises:
            ValueError: the length does not divide among the ranks.
        """
        if length % axis.size:
            raise ValueError(
                f"rows of {length} tokens do not divide into parallel.cp={axis.size} shards: "
                f"set data.seq_len to a multiple of {axis.size}"
            )
        bounds = tuple(cu_seqlens)
        assert set(range(0, rows * length + 1, length)) <= set(bounds), "row starts must be bounds"
        return cls(axis, (rows, length // axis.size), bounds, torch.device(device), linear, attention)

    # on the host, the same for all ranks

    def _begin(self, row: int, rank: int) -> int:
        """The first token of a shard of a row, among those of the whole rows."""
        T = self.shape[1]
        return (row * self.axis.size + rank) * T

    @cached_property
    def joins(self) -> tuple[tuple[bool, ...], ...]:
        """joins[r][b]: the first token of shard r of row b belongs to the document that shard r − 1 ends with."""
        starts, rows = set(self.bounds), range(self.shape[0])
        return tuple(tuple(self._begin(b, r) not in starts for b in rows) for r in range(self.axis.size))

    @cached_property
    def passes(self) -> tuple[tuple[bool, ...], ...]:
        """passes[r][b]: shard r of row b joins, and nothing but that document is in it."""
        T = self.shape[1]
        broken = {divmod(start // T, self.axis.size) for start in self.bounds[:-1] if start % T}
        return tuple(tuple(j and (b, r) not in broken for b, j in enumerate(row)) for r, row in enumerate(self.joins))

    @property
    def goes_on(self) -> tuple[bool, ...]:
        """Of each row, whether the next shard begins with the document that this rank's ends with."""
        return self.joins[self.axis.rank + 1] if self.axis.rank + 1 < self.axis.size else (False,) * self.shape[0]

    @property
    def connected(self) -> bool:
        """Whether any document crosses from a shard to the next, of any rank: if not, nothing need be exchanged."""
        return any(any(row) for row in self.joins)

    @cached_property
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

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(end - begin for begin, end in pairwise(self.bounds))

    @cached_property
    def longest_tail(self) -> int:
        """Tokens of the longest piece, of any rank's, that goes on in the next shard; 0: there is none."""
        longest = 0
        for r, row in enumerate(self.joins):
            for b, joined in enumerate(row):
                if joined:
                    end = self._begin(b, r)
                    begin = self.bounds[bisect_left(self.bounds, end) - 1]
                    longest = max(longest, end - max(begin, self._begin(b, r - 1)))
        return longest

    # on the host, of this rank

    @cached_property
    def _pieces(self) -> list[list[tuple[int, int]]]:
        """Of each row the (begin, end) of its pieces of documents among this rank's B·T tokens."""
        rows, T = [], self.shape[1]
        for b in range(self.shape[0]):
            shift = self._begin(b, self.axis.rank) - b * T
            inner = (bound - shift for bound in self.bounds if b * T < bound - shift < (b + 1) * T)
            rows.append(list(pairwise([b * T, *inner, (b + 1) * T])))
        return rows

    @cached_property
    def last_pieces(self) -> list[tuple[int, int]]:
        """(begin, end) of every row's last piece among the B·T tokens."""
        return [row[-1] for row in self._pieces]

    # on the device

    def _put(self, values: Sequence[int] | Sequence[bool], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor | None:
        """(S + 1,) int32 bounds of this rank's S pieces of documents; None if every row is one."""
        if all(len(row) == 1 for row in self._pieces):
            return None
        return self._put([0, *(end for row in self._pieces for _, end in row)], torch.int32)

    @cached_property
    def first(self) -> torch.Tensor:
        """(B,) int64 which of the S pieces is the first of each row."""
        return self.last - self._put([len(row) - 1 for row in self._pieces])

    @cached_property
    def last(self) -> torch.Tensor:
        """(B,) int64 which of the S pieces is the last of each row."""
        return self._put([count - 1 for count in accumulate(map(len, self._pieces))])

    @cached_property
    def row_seqlens(self) -> torch.Tensor:
        """(D + 1,) int32 `bounds`."""
        return self._put(self.bounds, torch.int32)

    @property
    def row_bounds(self) -> torch.Tensor | None:
        """`row_seqlens` if any document begins inside a row, else None: the whole rows as an op sees a batch."""
        return None if len(self.bounds) == self.shape[0] + 1 else self.row_seqlens

    @cached_property
    def first_of_last(self) -> torch.Tensor:
        """(B,) int64 where in its row of the shard each row's last piece begins."""
        return self._put([begin % self.shape[1] for begin, _ in self.last_pieces])

    @cached_property
    def _tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._ends(self.shape[1])

    @property
    def tail_seqlens(self) -> torch.Tensor | None:
        """(B + 1,) int32 bounds of what `tail` returns; None if the rows are whole."""
        return None if self.cu_seqlens is None else self._tail[1]

    def _ends(self, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of the last tokens, up to `limit`, of every row's last piece, and their (B + 1,) bounds."""
        pieces = [range(max(begin, end - limit), end) for begin, end in self.last_pieces]
        tokens = self._put([token for piece in pieces for token in piece])
        return tokens, self._put([0, *accumulate(map(len, pieces))], torch.int32)

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        """What the end of the shard depends on: x (B, T, …) as it is if the rows are whole, else of (1, B·T, …) the
        tokens of each row's last piece, (1, N, …) with bounds `tail_seqlens`."""
        return x if self.cu_seqlens is None else x.index_select(1, self._tail[0])

    def with_recent(self, x: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`x`, to be used once; as `tail`, but no more than `limit` tokens of each piece; and their bounds as an op
        takes them."""
        if self.cu_seqlens is None:
            return *with_end(x, max(0, self.shape[1] - limit)), None
        tokens, bounds = self._ends(limit)
        return x, x.index_select(1, tokens), bounds

    @cached_property
    def _masks(self) -> dict[tuple[bool, ...], torch.Tensor]:
        return {}

    def mask(self, flags: Sequence[bool], like: torch.Tensor) -> torch.Tensor:
        """(B,) flags that broadcast against `like` (B, …)."""
        key = tuple(flags)
        if key not in self._masks:
            self._masks[key] = self._put(key, torch.bool)
        return self._masks[key].view(-1, *(1,) * (like.dim() - 1))

    def only(self, flags: Sequence[bool], x: torch.Tensor) -> torch.Tensor:
        """x (B, …), zero in the rows whose flag is not set. All of it stays part of the graph: other ranks' backward
        passes may wait for this one's."""
        return x if all(flags) else x.masked_fill(self.mask([not flag for flag in flags], x), 0)

    def initial(self, incoming: torch.Tensor) -> torch.Tensor:
        """The rows' incoming states (B, …) → the initial states of all pieces (S, …), zeros where a document begins."""
        if self.cu_seqlens is None:
            return incoming
        states = incoming.new_zeros(len(self.cu_seqlens) - 1, *incoming.shape[1:])
        return states.index_copy(0, self.first, incoming)

    def final(self, leaving: torch.Tensor) -> torch.Tensor:
        """The same for what belongs to the rows' ends: (B, …) → (S, …), zeros where a document ends."""
        if self.cu_seqlens is None:
            return leaving
        states = leaving.new_zeros(len(self.cu_seqlens) - 1, *leaving.shape[1:])
        return states.index_copy(0, self.last, leaving)

    def of_last(self, x: torch.Tensor) -> torch.Tensor:
        """Of all pieces' (S, …) those of the rows' last ones (B, …)."""
        return x if self.cu_seqlens is None else x.index_select(0, self.last)

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

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """The shard before's `x` (B, …), a small one; zeros in rows that do not go on with its document."""
        joins = self.joins[self.axis.rank]
        lost = None if all(joins) or not self.axis.rank else self.mask([not joined for joined in joins], x)
        return shift(x, self.axis, lost)

    def incoming(self, added: torch.Tensor, transfer: torch.Tensor | None, apply: Apply = torch.mul) -> torch.Tensor:
        """The states (B, …) that enter this shard, of an affine recurrence; one gathering each way.

        Args:
            added: (B, …) the states at the ends of the rows' last pieces when each begins with zeros, in float32.
            transfer: (B, …) how such a state depends on the one before the piece: state = apply(transfer, before) +
                added. It counts only where the piece is the whole shard, so never if `chain` is 0; None: not at all.
        """
        if transfer is None:
            return self.before(added)
        parts, transfers, gathered = self._gather(added, transfer)
        state = torch.zeros_like(added)
        for r in range(self.axis.rank):
            state = self._through(r, parts[r], transfers[r], state, apply)
        state = self.only(self.joins[self.axis.rank], state).contiguous()
        return depend(state, gathered)  # on the first rank too: the gathering's backward pass is a collective

    def leaving(self, adjoints: torch.Tensor, transfer: torch.Tensor | None, apply: Apply = torch.mul) -> torch.Tensor:
        """The adjoints (B, …) of the states that leave this shard, zeros where nothing follows: `incoming` backwards.

        Args:
            adjoints: (B, …) of the states that enter the rows, when nothing that leaves them counts.
            transfer: (B, …) as in `incoming`, whose adjoint `apply` takes.
        """
        if transfer is None:
            return self.only(self.goes_on, pass_on(adjoints, self.axis, -1))
        parts, transfers, _ = self._gather(adjoints, transfer)
        state = torch.zeros_like(adjoints)
        for r in range(self.axis.size - 1, self.axis.rank, -1):
            state = self._through(r, parts[r], transfers[r], state, apply)
            state = self.only(self.joins[r], state)
        return state.contiguous()

    def _gather(self, added: torch.Tensor, transfer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All ranks' `added` and `transfer` (size, B, …), and the tensor that both are parts of."""
        numbers, both = added[0].numel(), [added.flatten(1), transfer.flatten(1).to(added.dtype)]
        gathered = all_gather(torch.cat(both, dim=1)[None], self.axis)  # (size, B, numbers of both)
        parts = gathered[..., :numbers].unflatten(-1, added.shape[1:])
        return parts, gathered[..., numbers:].unflatten(-1, transfer.shape[1:]), gathered

    def _through(
        self, rank: int, added: torch.Tensor, transfer: torch.Tensor, state: torch.Tensor, apply: Apply
    ) -> torch.Tensor:
        """A state, or an adjoint, on the other side of a shard."""
        if not any(self.passes[rank]):
            return added
        return added + self.only(self.passes[rank], apply(transfer, state))
