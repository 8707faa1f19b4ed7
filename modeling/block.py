"""One layer of the model: a token mixer and a SwiGLU, each with a norm and a residual connection."""

import torch
from torch import nn

from riverrun.modeling.layers import RMSNorm, SwiGLU
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import MIXERS, States
from riverrun.modeling.options import ModelOptions


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); or x + norm(mixer(x)) and so on where `post_norm_attention` asks."""

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

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        if self.post_norm:
            x = x + self.mixer_norm(self.mixer(x, layout, states))
            return x + self.mlp_norm(self.mlp(x)) if self.has_mlp else x
        x = x + self.mixer(self.mixer_norm(x), layout, states)
        return x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x
