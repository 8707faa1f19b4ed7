"""One layer of the model: a token mixer and a SwiGLU, each with a norm and a residual connection."""

import torch
from torch import nn

from riverrun.modeling.layers import RMSNorm, SwiGLU
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import MIXERS, States
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.collectives import all_gather, reduce_scatter
from riverrun.modeling.parallel.mesh import ALONE, Axis


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); or x + norm(mixer(x)) and so on where `post_norm_attention` asks; or
    norm(x + mixer(norm(x))) and so on where `sandwich_norm` does, so that what a block leaves is as large as its gain.

    Under tensor parallelism the residual stream is (B·T / tp.size, D), this rank's part of the flattened tokens, as in
    Megatron's sequence parallelism (arXiv 2205.05198): a sublayer sees all tokens, and makes part of a sum of them.
    """

    tp: Axis = ALONE

    def __init__(self, options: ModelOptions, mixer: str):
        super().__init__()
        self.post_norm = mixer == "attention" and options.post_norm_attention
        self.mixer_norm = RMSNorm(options.hidden_size, options.norm_eps)
        self.mixer = MIXERS[mixer](getattr(options, mixer), options.hidden_size, options.norm_eps)
        self.mixer.o_proj.writes_residual = True  # type: ignore[union-attr]
        self.has_mlp = options.intermediate_size != 0
        if options.intermediate_size:
            self.mlp_norm = RMSNorm(options.hidden_size, options.norm_eps)
            self.mlp = SwiGLU(options.hidden_size, options.intermediate_size)
            self.mlp.down_proj.writes_residual = True  # type: ignore[assignment]
        self.sandwich = options.sandwich_norm
        if self.sandwich:
            self.mixer_out_norm = RMSNorm(options.hidden_size, options.norm_eps)
            if self.has_mlp:
                self.mlp_out_norm = RMSNorm(options.hidden_size, options.norm_eps)

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        if self.post_norm:
            x = x + self.mixer_norm(self._leave(self.mixer(self._enter(x, layout), layout, states)))
            return x + self.mlp_norm(self._leave(self.mlp(self._enter(x, layout)))) if self.has_mlp else x
        x = x + self._leave(self.mixer(self._enter(self.mixer_norm(x), layout), layout, states))
        if self.sandwich:
            x = self.mixer_out_norm(x)
        if not self.has_mlp:
            return x
        x = x + self._leave(self.mlp(self._enter(self.mlp_norm(x), layout)))
        return self.mlp_out_norm(x) if self.sandwich else x

    def _enter(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The residual stream → (B, T, D) of all tokens."""
        return x if self.tp.size == 1 else all_gather(x, self.tp).view(*layout.shape, -1)

    def _leave(self, y: torch.Tensor) -> torch.Tensor:
        """A sublayer's output, on every rank its part of the sum → the residual stream."""
        return y if self.tp.size == 1 else reduce_scatter(y.flatten(0, 1), self.tp)
