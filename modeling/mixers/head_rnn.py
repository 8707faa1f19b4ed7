"""sLSTM, LSTM, GRU and Elman RNNs with dense recurrent matrices a head: nonlinear RNNs that step through time.

`slstm` is the block of xLSTM (Beck et al. 2024, arXiv 2405.04517, appendix A) up to its feed-forward part: input and
forget gates see a short convolution with SiLU, cell input and output gate the layer's input itself; then the cell, a
group norm of every head, a projection out. Unlike there, each gate is projected from the full width (the paper's four
block-diagonal maps would be H narrow ones here, where heads are as small as a kernel keeps on chip), and there is a
projection out at all: in the paper the feed-forward part does that.

The others share the block of ParaRNN (see `riverrun.modeling.mixers.para`): a branch u with a convolution and SiLU, a
projection of every head's channels to its gates, the cell, RMSNorm of every head, a gate SiLU(z), a projection out.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.kernels.block_linear import block_linear
from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.kernels.head_rnn import head_rnn
from riverrun.modeling.layers import ShortConv, short_convs
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import HeadRNNOptions, SLSTMOptions
from riverrun.modeling.mixers.base import Mixer, States, register
from riverrun.modeling.parallel.head_rnn import context_head_rnn
from riverrun.modeling.parallel.split import Plan
from riverrun.modeling.projection import project


class _HeadRNN(Mixer):
    """The cell with what every one of these blocks has around it."""

    cell: str
    num_gates: int
    num_states: int
    keeping_gate: int | None  # which gate keeps the state where it is large
    context_parallel = True
    flops: float  # a channel of one step beyond the products, a transcendental counted as one

    def __init__(self, options: HeadRNNOptions, hidden_size: int, conv_channels: int):
        super().__init__()
        self.options = options
        self.inner = options.inner_size(hidden_size)
        self.num_heads = self.inner // options.head_dim
        G, H, K = self.num_gates, self.num_heads, options.head_dim
        self.conv_channels = conv_channels if options.conv_kernel else 0
        self.conv = ShortConv(conv_channels, options.conv_kernel, bias=True) if options.conv_kernel else None
        self.gate_bias = nn.Parameter(torch.empty(G, self.inner))
        self.gate_bias.no_weight_decay = True  # type: ignore[attr-defined]
        self.recurrent_weight = nn.Parameter(torch.empty(G, H, K, K))
        self.norm_weight = nn.Parameter(torch.empty(self.inner))
        self.o_proj = nn.Linear(self.inner, hidden_size, bias=False)

    def convolve(self, x: torch.Tensor, layout: Layout, states: States | None) -> torch.Tensor:
        return x if self.conv is None else short_convs(layout, states, conv=(self.conv, x))[0]

    def recur(self, gates: torch.Tensor, layout: Layout, states: States | None) -> torch.Tensor:
        """Pre-activations (B, T, G, inner) without their bias → h (B, T, H, K)."""
        gates = (gates + self.gate_bias).unflatten(-1, (-1, self.options.head_dim))
        if layout.context is not None:
            return context_head_rnn(layout.context, gates, self.recurrent_weight, self.cell)
        h, state = head_rnn(
            gates, self.recurrent_weight, self.cell,
            initial_state=layout.initial(states, "cell"), cu_seqlens=layout.cu_seqlens,
        )  # fmt: skip
        if states is not None:
            states["cell"] = layout.last(state)
        return h

    def reset_parameters(self) -> None:
        bound = self.options.recurrent_init / math.sqrt(self.options.head_dim)
        nn.init.uniform_(self.recurrent_weight, -bound, bound)
        nn.init.zeros_(self.gate_bias)
        if self.keeping_gate is not None:
            o = self.options
            biases = torch.linspace(o.forget_bias_min, o.forget_bias_max, o.head_dim)  # type: ignore[attr-defined]
            with torch.no_grad():
                self.gate_bias[self.keeping_gate].view(self.num_heads, -1).copy_(biases)
        nn.init.ones_(self.norm_weight)

    def parameter_plan(self, tp: int = 1) -> Plan:
        return {"gate_bias": 1, "recurrent_weight": 1, "norm_weight": 0, "o_proj.weight": 1}

    def mixing_flops(self, seq_len: int) -> float:
        return self.flops * self.inner

    def state_bytes(self, seq_len: int) -> int:
        return 4 * self.num_states * self.inner + 2 * max(0, self.options.conv_kernel - 1) * self.conv_channels


@register("slstm")
class SLSTM(_HeadRNN):
    """Gates i, f, z, o; states c, n, m, h."""

    cell, num_gates, num_states, keeping_gate, flops = "slstm", 4, 4, 1, 20.0

    def __init__(self, options: SLSTMOptions, hidden_size: int, norm_eps: float):
        super().__init__(options, hidden_size, conv_channels=hidden_size)
        self.i_gate = nn.Linear(hidden_size, self.inner, bias=False)
        self.f_gate = nn.Linear(hidden_size, self.inner, bias=False)
        self.z_gate = nn.Linear(hidden_size, self.inner, bias=False)
        self.o_gate = nn.Linear(hidden_size, self.inner, bias=False)

    def forward(self, hidden: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        hidden = layout.flatten(hidden)
        x = self.convolve(hidden, layout, states)
        gates = torch.cat([_project(x, self.i_gate, self.f_gate), _project(hidden, self.z_gate, self.o_gate)], dim=-1)
        h = self.recur(gates.unflatten(-1, (4, -1)), layout, states)
        h = F.layer_norm(h, h.shape[-1:], eps=self.options.norm_eps).flatten(2) * self.norm_weight
        return layout.unflatten(self.o_proj(h))

    def parameter_plan(self, tp: int = 1) -> Plan:
        plan: Plan = {f"{gate}_gate.weight": 0 for gate in "ifzo"}
        if self.conv is not None:  # over the residual stream, which every rank has
            plan |= {"conv.weight": None, "conv.bias": None}
        return super().parameter_plan(tp) | plan


class _GatedHeadRNN(_HeadRNN):
    def __init__(self, options: HeadRNNOptions, hidden_size: int, norm_eps: float):
        super().__init__(options, hidden_size, conv_channels=options.inner_size(hidden_size))
        self.u_proj = nn.Linear(hidden_size, self.inner, bias=False)
        self.z_proj = nn.Linear(hidden_size, self.inner, bias=False)
        K = options.head_dim
        self.gate_weight = nn.Parameter(torch.empty(self.num_heads, K, self.num_gates, K))

    def forward(self, hidden: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        hidden = layout.flatten(hidden)
        u, z = project(hidden, self.u_proj, self.z_proj)
        u = self.convolve(u, layout, states)
        h = self.recur(block_linear(u, self.gate_weight), layout, states).flatten(2)
        h = gated_rms_norm(
            h, z, self.norm_weight, eps=self.options.norm_eps, groups=len(self.gate_weight),
            norm_before_gate=True,
        )  # fmt: skip
        return layout.unflatten(self.o_proj(h))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        bound = math.sqrt(3 / self.options.head_dim)  # Kaiming uniform, as in ParaRNN's block
        nn.init.uniform_(self.gate_weight, -bound, bound)

    def parameter_plan(self, tp: int = 1) -> Plan:
        plan: Plan = {"u_proj.weight": 0, "z_proj.weight": 0, "gate_weight": 0}
        if self.conv is not None:
            plan |= {"conv.weight": 0, "conv.bias": 0}
        return super().parameter_plan(tp) | plan


@register("lstm")
class LSTM(_GatedHeadRNN):
    """Gates i, f, z, o; states c, h."""

    cell, num_gates, num_states, keeping_gate, flops = "lstm", 4, 2, 1, 10.0


@register("gru")
class GRU(_GatedHeadRNN):
    """Gates r, z, n; state h."""

    cell, num_gates, num_states, keeping_gate, flops = "gru", 3, 1, 1, 9.0


@register("elman")
class Elman(_GatedHeadRNN):
    """h = tanh(u + R h)."""

    cell, num_gates, num_states, keeping_gate, flops = "elman", 1, 1, None, 2.0


def _project(x: torch.Tensor, *projections: nn.Linear) -> torch.Tensor:
    """Several projections of `x` in one product, side by side."""
    return F.linear(x, torch.cat([p.weight for p in projections]))
