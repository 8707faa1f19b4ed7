"""The recurrent core: layers that run again and again on their own output and the prelude's."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from riverrun.modeling.block import Block
from riverrun.modeling.depth.injection import INJECTIONS
from riverrun.modeling.depth.statistics import note_iterates
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import States
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.stack import block_flops, leave_mixer_eager

Drive = tuple[torch.Tensor, torch.Tensor]


class RecurrentCore(nn.Module):
    """s_i = layers(inject(s_{i−1}, e)), the whole loop (Geiping et al. 2025, arXiv 2502.05171).

    Only the last k iterations have a gradient (truncated backpropagation): the state that enters them is a constant,
    and e gets a gradient from their injections alone.

    ZeRO-3 gathers its parameters once a pass, not at each iteration: their number varies, and its record of the order
    of modules with it.
    """

    fetched_whole = True

    def __init__(self, options: ModelOptions, mixers: Sequence[str]):
        super().__init__()
        assert options.depth is not None
        self.injection = INJECTIONS[options.depth.injection](options)
        self.layers = nn.ModuleList(Block(options, mixer) for mixer in mixers)

    def forward(
        self,
        e: torch.Tensor,
        s: torch.Tensor,
        layout: Layout,
        n: int,
        k: int,
        states: Iterator[list[States]] | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """n iterations without a gradient, then k with one, and the read-out.

        Args:
            e: (B, T, h) the prelude's output; of tensor-parallel ranks, of this rank's tokens.
            s: (B, T, h) s_0.
            states: of the layers, for each iteration (see `DepthCache`); None: there are no tokens before.
            recompute: keep of each iteration with a gradient only its state, and compute the rest again.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and k > 0):
            drive = self.injection.drive(e)
        constant = drive[0].detach(), drive[1].detach()
        with torch.no_grad():
            for _ in range(n):
                before = s
                s = self.advance(s, constant, layout, None if states is None else next(states))
        if n:
            torch.clear_autocast_cache()  # of weights that were cast without a gradient (pytorch issue 65766)
        with torch.set_grad_enabled(torch.is_grad_enabled() and k > 0):
            for _ in range(k):
                before = s
                if recompute:
                    s = checkpoint(self.advance, s, drive, layout, use_reentrant=False)
                else:
                    s = self.advance(s, drive, layout, None if states is None else next(states))
            if self.training:
                note_iterates(before, s, rows=s.dim() == 3 and layout.context is None)
            return self.injection.read_out(s)

    def advance(
        self, s: torch.Tensor, drive: Drive, layout: Layout, states: Sequence[States] | None = None
    ) -> torch.Tensor:
        """One iteration, of what `injection.drive` makes of e."""
        x = self.injection(s, drive)
        for i, block in enumerate(self.layers):
            x = block(x, layout, None if states is None else states[i])
        return x

    def iterate(
        self, s: torch.Tensor, e: torch.Tensor, layout: Layout, states: Sequence[States] | None = None
    ) -> torch.Tensor:
        """One iteration by itself: s_{i−1} → s_i."""
        return self.advance(s, self.injection.drive(e), layout, states)

    def compile_iteration(self) -> None:
        """torch.compile one iteration, which has the same shapes however many there are; the loop stays in Python."""
        for block in self.layers:
            leave_mixer_eager(block)
        self.advance = torch.compile(self.advance)  # type: ignore[method-assign]

    def step_flops(self, seq_len: int) -> float:
        """Forward FLOPs a token of one iteration."""
        return block_flops(self.layers, seq_len) + self.injection.step_flops()

    def call_flops(self) -> float:
        """Forward FLOPs a token of what is computed once, however many iterations there are."""
        return self.injection.call_flops()
