"""How the tokens of a (B, T) batch form sequences, and what the mixers derive from it once a forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from riverrun.modeling.parallel.context import Context


@dataclass
class Layout:
    """The sequences of one forward pass.

    Rows may hold several sequences (packed documents, or left padding followed by a prompt); a sequence never crosses
    a row. Recurrent mixers see such a batch flattened to (1, B·T, …) with `cu_seqlens`; an unpacked one as it is.

    Attributes:
        shape: (B, T).
        cu_seqlens: (S + 1,) int32 bounds over the flattened B·T tokens; None: every row is one sequence.
        sequence: (B, T) int64 which sequence a token belongs to; None when every row is one sequence.
        positions: (B, T) int64 position of each token in its sequence, cached tokens counted.
        rope: cosine and sine (B, 1, T, head_dim), for attention layers with rotary positions.
        mask: (B, 1, T, P + T) bool, True where a query may look, for attention over P cached and T new tokens; None:
            there are no cached ones, or one new token looks at everything.
        context: where this is a shard of longer rows, what joins it to the other ranks'; `cu_seqlens` and `sequence`
            are then of its pieces of documents, and `positions` count from their documents' starts.
        prefix: (B, T) bool, the tokens that are read without causality, the first ones of each row and of its
            sequences; None: none. Only prefix linear attention heeds it.
    """

    shape: tuple[int, int]
    cu_seqlens: torch.Tensor | None
    sequence: torch.Tensor | None
    positions: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    context: Context | None = None
    prefix: torch.Tensor | None = None

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, …) → (1, B·T, …) if the batch is packed."""
        return x if self.cu_seqlens is None else x.reshape(1, -1, *x.shape[2:])

    def unflatten(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `flatten`."""
        return x if self.cu_seqlens is None else x.reshape(*self.shape, *x.shape[2:])

    def last(self, state: torch.Tensor) -> torch.Tensor:
        """(S, …) final states of all sequences → (B, …) those of each row's last sequence."""
        return state if self.sequence is None else state[self.sequence[:, -1]]

    @property
    def max_seqlen(self) -> int:
        """What no sequence has more tokens than: those of a row, which it never crosses."""
        return self.shape[1]

    @property
    def num_sequences(self) -> int:
        return self.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def initial(
        self, states: Mapping[str, torch.Tensor] | None, name: str, fresh: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """What the sequences start from, by the rows' states (B, …) of that name: (S, …), `fresh` (1, …) or zeros for
        all but each row's first; None: zeros for all."""
        state = None if states is None else states.get(name)
        if state is None:
            return None if fresh is None else fresh.expand(self.num_sequences, *fresh.shape[1:])
        if self.sequence is None or self.cu_seqlens is None:
            return state
        start = state.new_zeros(1, *state.shape[1:]) if fresh is None else fresh.to(state.dtype)
        start = start.expand(self.num_sequences, *state.shape[1:])
        return start.index_copy(0, self.sequence[:, 0], state)

    @classmethod
    def of_rows(cls, shape: tuple[int, int], start: torch.Tensor) -> "Layout":
        """Every row continues one sequence from position `start` (B,)."""
        return cls(shape, None, None, start[:, None] + torch.arange(shape[1], device=start.device))

    @classmethod
    def of_documents(cls, shape: tuple[int, int], cu_seqlens: torch.Tensor) -> "Layout":
        """Packed documents with the given (S + 1,) bounds over the flattened tokens; every row start is a bound."""
        tokens = torch.arange(shape[0] * shape[1], device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        positions = tokens - cu_seqlens.long()[sequence]
        return cls(shape, cu_seqlens, sequence.view(shape), positions.view(shape))

    @classmethod
    def of_shard(cls, context: Context) -> "Layout":
        """This rank's shard of rows that lie on several ranks."""
        (B, T), axis = context.shape, context.axis
        device = context.row_seqlens.device
        if context.row_bounds is None:
            rows = cls.of_rows((B, T * axis.size), torch.zeros(B, dtype=torch.int64, device=device))
        else:
            rows = cls.of_documents((B, T * axis.size), context.row_bounds)
        positions = rows.positions[:, axis.share(T * axis.size)]
        if context.cu_seqlens is None:
            return cls((B, T), None, None, positions, context=context)
        tokens = torch.arange(B * T, device=device)
        sequence = (torch.searchsorted(context.cu_seqlens, tokens, right=True) - 1).view(B, T)
        return cls((B, T), context.cu_seqlens, sequence, positions, context=context)

    @classmethod
    def of_left_padded(cls, attention_mask: torch.Tensor) -> "Layout":
        """Rows of padding (0) followed by one sequence (1), from a (B, T) mask; padding forms sequences of its own.

        Raises:
            ValueError: padding that is not on the left, or a row of nothing but padding.
        """
        mask = attention_mask.bool()
        if not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
            raise ValueError(
                "padding must be on the left of every row (set tokenizer.padding_side = 'left'): a recurrent state "
                "cannot skip tokens after the text"
            )
        starts = torch.ones_like(mask)
        starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
        bounds = starts.flatten().nonzero().squeeze(1)
        cu_seqlens = torch.cat([bounds, bounds.new_tensor([mask.numel()])]).to(torch.int32)
        return cls.of_documents((mask.shape[0], mask.shape[1]), cu_seqlens)

    def attention_mask(self, window: int | None, past_valid: torch.Tensor | None, past_len: int) -> torch.Tensor | None:
        """The mask for attention with `past_len` > 0 cached tokens, of which `past_valid` (B, past_len) belong to the
        row's running sequence (None: all of them); see `mask`."""
        B, T = self.shape
        device = self.positions.device
        if self.sequence is None and past_valid is None and T == 1 and (window is None or past_len < window):
            return None
        query = past_len + torch.arange(T, device=device)[:, None]
        key = torch.arange(past_len + T, device=device)
        allowed = key <= query
        if window is not None:
            allowed &= query - key < window
        allowed = allowed.expand(B, 1, T, past_len + T).clone()
        if self.sequence is not None:
            allowed[..., past_len:] &= (self.sequence[:, :, None] == self.sequence[:, None, :])[:, None]
            allowed[..., :past_len] = False
        elif past_valid is not None:
            allowed[..., :past_len] &= past_valid[:, None, None, :]
        return allowed


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """Cosine and sine (B, 1, T, head_dim) of RoFormer's rotary angles (arXiv 2104.09864), halves repeated."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)
