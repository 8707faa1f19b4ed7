"""The active window: tokens after a frozen prefix, run from its states as often as a sampler likes.

The frozen prefix, the base, is a `DepthCache`: states of the prelude, the coda and slots of the core. A window of W
tokens starts every pass of blocks from them and leaves them as they are; what the pass leaves is kept beside. So the
window sees itself at its own iteration and the prefix as its slot has it. Of attention that is sharing of keys and
values; of a recurrent layer the base is the state at the boundary, made of last iterates alone.

Dropping what a pass left rolls it back. Freezing the first F of the W tokens moves the base on by them:

- attention of the whole prefix: its keys and values, less those of the W − F tokens at the end. That costs nothing.
- any other layer: a state after all W tokens does not tell the one after F, unless F = W, so the mixer (not its MLP)
  runs again over the F tokens, from the base and on what it read in the pass. What it reads is known, so all slots go
  in one call, as rows of a batch: of each such layer one short call a freeze, whatever the number of slots.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch

from riverrun.modeling.depth.cache import DepthCache
from riverrun.modeling.depth.model import DepthModel
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import Attention, States


class Pass(NamedTuple):
    """Blocks that ran once over a window.

    Attributes:
        inputs: (B, W, h) of each block.
        before: each block's states that it started from.
        after: those that it left.
    """

    inputs: list[torch.Tensor]
    before: Sequence[States]
    after: list[States]


def run(blocks: Iterable[Any], x: torch.Tensor, layout: Layout, base: Sequence[States]) -> tuple[torch.Tensor, Pass]:
    """Blocks one after the other, each from its states of the base: their output, and what they did."""
    inputs: list[torch.Tensor] = []
    after: list[States] = []
    for block, before in zip(blocks, base):
        inputs.append(x)
        after.append(dict(before))
        x = block(x, layout, after[-1])
    return x, Pass(inputs, base, after)


class Window:
    """`width` tokens after those of a base, in each of its rows.

    Attributes:
        layout: the positions of the window's tokens.
    """

    def __init__(self, body: DepthModel, base: DepthCache, width: int):
        assert base.next_position is not None
        self.body, self.base, self.width = body, base, width
        self.layout = self._layout(width)
        self._prepare(self.layout)

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, Pass]:
        """ids (B, W) → e (B, W, h), the prelude's output."""
        return run(self.body.prelude, self.body.embed(ids), self.layout, self.base.layers)

    def initial_state(self, e: torch.Tensor) -> torch.Tensor:
        """s_0 (B, W, h)."""
        return self.body.initial_state(e, self.layout)

    def iterate(
        self, s: torch.Tensor, drive: tuple[torch.Tensor, torch.Tensor], slot: int
    ) -> tuple[torch.Tensor, Pass]:
        """One iteration of the core, from a slot of the base: s_{i−1} → s_i, (B, W, h).

        Args:
            drive: what `core.injection.drive` makes of e.
        """
        core, first = self.body.core, self.base.outside + slot * self.base.core
        return run(core.layers, core.injection(s, drive), self.layout, self.base.layers[first : first + self.base.core])

    def finish(self, s: torch.Tensor) -> tuple[torch.Tensor, Pass]:
        """Read-out, norm, coda and norm: s (B, W, h) → what `lm_head` makes logits of."""
        body = self.body
        x = body.core.injection.read_out(s)
        states = self.base.layers[len(body.prelude) : self.base.outside]
        x, coda = run(body.coda, body.norm(x) if body.depth.norm_core else x, self.layout, states)
        return body.norm(x), coda

    def freeze(self, number: int, prelude: Pass, core: Sequence[Pass], coda: Pass) -> DepthCache:
        """The base after the first `number` tokens of the window; the old one stays as it is.

        Args:
            core: the last pass of each slot.
        """
        return self.moved(
            number,
            self.keep(self.body.prelude, [prelude], number)[0],
            self.keep(self.body.coda, [coda], number)[0],
            self.keep(self.body.core.layers, core, number),
        )

    def moved(
        self, number: int, prelude: list[States], coda: list[States], slots: Sequence[list[States]]
    ) -> DepthCache:
        """A base of these states, which are those after the first `number` tokens."""
        base = copy(self.base)
        base.layers = [*prelude, *coda, *(states for slot in slots for states in slot)]
        base.advance(self.layout.positions[:, :number], None)
        return base

    def keep(self, blocks: Iterable[Any], passes: Sequence[Pass], number: int) -> list[list[States]]:
        """Of each pass of the same blocks, their states after the first `number` tokens."""
        kept: list[list[States]] = [[] for _ in passes]
        for i, block in enumerate(blocks):
            if number == self.width:
                found = [done.after[i] for done in passes]
            elif isinstance(block.mixer, Attention) and block.mixer.options.window is None:
                found = [self._cut(done.after[i], number) for done in passes]
            else:
                found = self._again(block, [done.inputs[i] for done in passes], [p.before[i] for p in passes], number)
            for states, mine in zip(found, kept):
                mine.append(states)
        return kept

    def _cut(self, states: States, number: int) -> States:
        """Keys and values (B, H, tokens, d) without the window's later ones."""
        return {name: state[:, :, : state.shape[2] - (self.width - number)] for name, state in states.items()}

    def _again(self, block: Any, inputs: list[torch.Tensor], before: list[States], number: int) -> list[States]:
        """States of the block's mixer after the first tokens of each pass, all passes in one call."""
        layout = self._layout(number, copies=len(inputs))
        if isinstance(block.mixer, Attention):
            self._prepare(layout)
        x = torch.cat([x[:, :number] for x in inputs])
        states = {name: torch.cat([each[name] for each in before]) for name in before[0]}
        block.mixer(x if block.post_norm else block.mixer_norm(x), layout, states)
        rows = {name: state.chunk(len(inputs)) for name, state in states.items()}
        return [{name: parts[i] for name, parts in rows.items()} for i in range(len(inputs))]

    def _layout(self, width: int, copies: int = 1) -> Layout:
        assert self.base.next_position is not None
        start = self.base.next_position.repeat(copies)
        return Layout.of_rows((len(start), width), start)

    def _prepare(self, layout: Layout) -> None:
        self.body.prepare_attention(layout, self.base, self.body.embed_tokens.weight.dtype)
