"""What decoding keeps between calls: recurrent states, convolution tails, keys and values."""

import torch


class RiverrunCache:
    """One dictionary of (B, …) tensors a layer, and how many tokens each row has seen.

    Every mixer reads and writes its own layer's dictionary. Attention with a window keeps only the keys it can still
    see, so a cache of recurrent and windowed layers has constant size.

    Attributes:
        layers: per layer, named states.
        next_position: (B,) position of the next token in its row's running sequence, or None before the first call.
        valid: (B, seen) which cached tokens belong to the running sequence, or None if all do.
        seen: tokens a row, padding counted.
    """

    is_compileable = False  # asked by transformers' generate,
    is_linear = (True,)  # and, from 5.24 on, this: whether to leave it to the model to cut off what has been seen

    def __init__(self, num_layers: int):
        self.layers: list[dict[str, torch.Tensor]] = [{} for _ in range(num_layers)]
        self.next_position: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def advance(self, positions: torch.Tensor, sequence: torch.Tensor | None) -> None:
        """Note T new tokens: their (B, T) positions and, in a packed batch, which sequence each is in."""
        B, T = positions.shape
        self.next_position = positions[:, -1] + 1
        if sequence is not None or self.valid is not None:
            new = torch.ones_like(positions, dtype=torch.bool) if sequence is None else sequence == sequence[:, -1:]
            old = self.valid if self.valid is not None else new.new_ones(B, self.seen)
            if sequence is not None:
                old = torch.zeros_like(old)  # a packed call starts new sequences
            self.valid = torch.cat([old, new], dim=1)
        self.seen += T

    def reorder_cache(self, beam_idx: torch.Tensor) -> "RiverrunCache":
        """Pick rows (beam search)."""
        for layer in self.layers:
            for name, state in layer.items():
                layer[name] = state.index_select(0, beam_idx.to(state.device))
        if self.next_position is not None:
            self.next_position = self.next_position.index_select(0, beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx)
        return self

    def num_bytes(self) -> int:
        return sum(state.numel() * state.element_size() for layer in self.layers for state in layer.values())
