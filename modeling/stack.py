"""The body of a model between tokens and head: `RiverrunModel` runs its blocks once each, from first to last."""

import math
from collections import UserDict, UserList
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from riverrun.modeling.block import Block
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.layers import RMSNorm
from riverrun.modeling.layout import Layout, rotary_tables
from riverrun.modeling.mixers import States
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.loss import sharded_embedding
from riverrun.modeling.parallel.mesh import ALONE, Axis


class Stack(nn.Module):
    """What bodies of all kinds do with their embedding and their blocks.

    Under tensor parallelism hidden states are (B·T / tp.size, hidden_size), of this rank's part of the flattened
    tokens.
    """

    tp: Axis = ALONE
    embed_tokens: nn.Embedding

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.options = options
        self.embed_tokens = nn.Embedding(options.vocab_size, options.hidden_size)
        self.recompute = False

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, T) → (B, T, hidden_size)"""
        if self.tp.size == 1:
            x = self.embed_tokens(input_ids)
        else:
            x = sharded_embedding(input_ids, self.embed_tokens.weight, self.tp)
        return x * math.sqrt(self.options.hidden_size) if self.options.scale_embedding else x

    def run(
        self, blocks: Iterable[nn.Module], x: torch.Tensor, layout: Layout, states: Sequence[States] | None = None
    ) -> torch.Tensor:
        """Blocks one after the other, each with its states of the tokens before, which it replaces."""
        for i, block in enumerate(blocks):
            if states is not None:
                x = block(x, layout, states[i])
            elif self.recompute and self.training:
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout)
        return x

    def prepare_attention(self, layout: Layout, cache: RiverrunCache | None, dtype: torch.dtype) -> None:
        """Rotary tables and the mask, once for all attention layers."""
        if "attention" not in self.options.layer_pattern:
            return
        options = self.options.attention
        past = cache.seen if cache is not None else 0
        if options.window is not None:
            past = min(past, options.window - 1)
        valid = cache.valid[:, cache.valid.shape[1] - past :] if cache is not None and cache.valid is not None else None
        if past:
            layout.mask = layout.attention_mask(options.window, valid, past)
        if options.rope:
            layout.rope = rotary_tables(layout.positions, options.head_dim, options.rope_theta, dtype)


class RiverrunModel(Stack):
    """Token embedding, the blocks and the final norm."""

    def __init__(self, options: ModelOptions):
        super().__init__(options)
        self.layers = nn.ModuleList(Block(options, mixer) for mixer in options.layers)
        self.norm = RMSNorm(options.hidden_size, options.norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        layout: Layout,
        cache: RiverrunCache | None = None,
        states: UserList | None = None,
    ) -> torch.Tensor:
        """input_ids (B, T) → hidden states (B, T, hidden_size) after the final norm.

        `cache` is updated in place. In training, `states` are what recurrent layers start the rows from, and are
        replaced by those after them, detached; layers of attention have none.
        """
        x = self.embed(input_ids)
        self.prepare_attention(layout, cache, x.dtype)
        if states is None:
            x = self.run(self.layers, x, layout, None if cache is None else cache.layers)
        else:
            x = self._carry_all(x, layout, states)
        if cache is not None:
            cache.advance(layout.positions, layout.sequence)
        return self.norm(x)

    def make_cache(self, slots: int | None = None) -> RiverrunCache:
        """An empty cache for decoding.

        Raises:
            ValueError: `slots` is given: no layer here runs twice.
        """
        if slots is not None:
            raise ValueError(
                "slots of a cache are shared by the iterations of a core (model.depth), and this model has none: leave "
                "slots out"
            )
        return RiverrunCache(len(self.layers))

    def compile_blocks(self) -> None:
        """See `RiverrunForCausalLM.compile_blocks`."""
        for block in self.layers:
            leave_mixer_eager(block)
            block.compile()

    def flops_per_token(self, seq_len: int) -> float:
        """Of the forward pass, without the head."""
        return block_flops(self.layers, seq_len)

    def state_bytes(self, seq_len: int) -> int:
        """Bytes of decoding state a sequence after `seq_len` tokens."""
        return block_state_bytes(self.layers, seq_len)

    def _carry_all(self, x: torch.Tensor, layout: Layout, states: UserList) -> torch.Tensor:
        for i, block in enumerate(self.layers):
            if self.options.layers[i] == "attention":
                x = self.run([block], x, layout)
            else:
                x, after = self._carry(block, x, layout, states[i])
                states[i] = {name: state.detach() for name, state in after.items()}
        return x

    def _carry(self, block: nn.Module, x: torch.Tensor, layout: Layout, before: States) -> tuple[torch.Tensor, States]:
        """A block that starts from states: its output, and the states after the rows."""

        def run(x: torch.Tensor) -> tuple[torch.Tensor, States]:
            states: Any = UserDict(before)  # mixers write into theirs, and recomputing starts from `before` again
            return block(x, layout, states), states.data

        return checkpoint(run, x, use_reentrant=False) if self.recompute and self.training else run(x)


def leave_mixer_eager(block: Any) -> None:
    """Before a block is compiled: recurrent mixers stay eager, for their chunk layout follows the documents of each
    batch, on the host."""
    if not block.mixer.traceable:
        block.mixer.forward = torch.compiler.disable(block.mixer.forward)


def block_flops(blocks: Iterable[Any], seq_len: int) -> float:
    """Forward FLOPs a token of blocks that run once: 2 a matrix parameter, and what mixers do beyond those."""
    flops = 0.0
    for block in blocks:
        flops += 2.0 * sum(p.numel() for p in block.parameters() if p.dim() >= 2) + block.mixer.mixing_flops(seq_len)
    return flops


def block_state_bytes(blocks: Iterable[Any], seq_len: int) -> int:
    """Bytes of decoding state a sequence of blocks that run once."""
    return sum(block.mixer.state_bytes(seq_len) for block in blocks)
