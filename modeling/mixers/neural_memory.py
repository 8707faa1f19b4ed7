"""A neural memory as a layer of its own: Titans' LMM, the models of Miras and those of ATLAS, which are one rule.

What a memory says is normed per head and gated, like what a gated delta layer reads (`mixers/gated_delta.py`).
"""

import torch
from torch import nn

from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.modeling.layout import Layout
from riverrun.modeling.memory_options import NeuralMemoryOptions
from riverrun.modeling.mixers.base import Mixer, States, register
from riverrun.modeling.neural_memory import NeuralMemory
from riverrun.modeling.parallel.split import Plan


class MemoryMixer(Mixer):
    """`NeuralMemory`, a norm, a gate and the projection back."""

    context_parallel = True

    def __init__(self, options: NeuralMemoryOptions, hidden_size: int, norm_eps: float):
        super().__init__()
        self.options = options
        channels = options.num_heads * options.head_dim
        self.memory = NeuralMemory(options, hidden_size)
        if options.num_persistent:
            self.persistent = nn.Parameter(torch.empty(options.num_persistent, hidden_size))
        if options.output_gate:
            self.g_proj = nn.Linear(hidden_size, channels, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(options.head_dim))
        self.o_proj = nn.Linear(channels, hidden_size, bias=False)

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        o = self.options
        parts, gates = self.memory.project(layout.flatten(x), *([self.g_proj] if o.output_gate else []))
        y = self.memory(parts, layout, states, self.persistent if o.num_persistent else None)
        gate = gates[0].unflatten(-1, (-1, o.head_dim)) if gates else None
        y = gated_rms_norm(y, gate, self.norm_weight, eps=o.norm_eps, norm_before_gate=True)
        return layout.unflatten(self.o_proj(y.flatten(2)))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm_weight)
        if self.options.num_persistent:
            nn.init.normal_(self.persistent)  # the stream is normed before it comes here

    def parameter_plan(self, tp: int = 1) -> Plan:
        plan: Plan = {f"memory.{name}": split for name, split in self.memory.parameter_plan().items()}
        if self.options.num_persistent:
            plan["persistent"] = None
        if self.options.output_gate:
            plan["g_proj.weight"] = 0
        return plan | {"norm_weight": None, "o_proj.weight": 1}

    def mixing_flops(self, seq_len: int) -> float:
        return self.memory.mixing_flops(seq_len)

    def state_bytes(self, seq_len: int) -> int:
        return self.memory.state_bytes()


@register("titans_lmm")
class TitansLMM(MemoryMixer):
    """Titans' memory as a layer (arXiv 2501.00663, §3)."""


@register("moneta")
class Moneta(MemoryMixer):
    """An ℓ_p loss and ℓ_q retention (arXiv 2504.13173, §5.3).

    The norm is taken at chunks' starts, as there; within a chunk weights keep that scale.
    """


@register("yaad")
class Yaad(MemoryMixer):
    """A Huber loss (arXiv 2504.13173, §5.3)."""


@register("memora")
class Memora(MemoryMixer):
    """Weights that are probabilities (arXiv 2504.13173, §5.3).

    The update is exact at every chunk's start, since a softmax does not mind that its logarithms are not normalised;
    tokens read the weights of their chunk's start, where the paper goes on with linearised ones.
    """


@register("omeganet")
class OmegaNet(MemoryMixer):
    """The Omega rule (arXiv 2505.23735, §4)."""


@register("atlas")
class Atlas(MemoryMixer):
    """The Omega rule with momentum and Muon's update (arXiv 2505.23735, §5)."""


@register("deep_transformer")
class DeepTransformer(MemoryMixer):
    """A deep memory of dot products on the exponential's first features (arXiv 2505.23735, §3.2)."""
