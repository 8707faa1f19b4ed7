"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, §7): short convolutions, the SSD recurrence, a gated norm."""

import torch
from torch import nn

from riverrun.kernels.ssd import ssd
from riverrun.kernels.ssd.steps import step_sizes
from riverrun.modeling.layers import ShortConv, at_least_fp32, fp32_parameter, init_decay, short_convs
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import Mamba2Options
from riverrun.modeling.mixers.base import Mixer, States, register
from riverrun.modeling.parallel.linear import context_ssd
from riverrun.modeling.parallel.norm import sharded_rms_norm
from riverrun.modeling.parallel.split import Plan
from riverrun.modeling.projection import project
from riverrun.modeling.state_control import StateControl


@register("mamba2")
class Mamba2(Mixer):
    """z, x, B, C, dt are projections of their own; the norm acts on each of the G groups, after the gate."""

    context_parallel = True
    state_control: StateControl | None = None  # in evaluation mode, see `riverrun.modeling.state_control`

    def __init__(self, options: Mamba2Options, hidden_size: int, norm_eps: float):
        super().__init__()
        self.options = options
        inner = options.expand * hidden_size
        groups = options.num_groups * options.state_size
        self.num_heads = inner // options.head_dim
        self.z_proj = nn.Linear(hidden_size, inner, bias=False)
        self.x_proj = nn.Linear(hidden_size, inner, bias=False)
        self.B_proj = nn.Linear(hidden_size, groups, bias=False)
        self.C_proj = nn.Linear(hidden_size, groups, bias=False)
        self.dt_proj = nn.Linear(hidden_size, self.num_heads, bias=False)
        self.x_conv = ShortConv(inner, options.conv_kernel, options.conv_bias)
        self.B_conv = ShortConv(groups, options.conv_kernel, options.conv_bias)
        self.C_conv = ShortConv(groups, options.conv_kernel, options.conv_bias)
        self.A_log = fp32_parameter(self.num_heads)
        self.dt_bias = fp32_parameter(self.num_heads)
        self.D = fp32_parameter(self.num_heads)
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.o_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        o = self.options
        hidden = layout.flatten(hidden)
        z, x, B, C, dt = project(hidden, self.z_proj, self.x_proj, self.B_proj, self.C_proj, self.dt_proj)
        x, B, C = short_convs(
            layout, states, x_conv=(self.x_conv, x), B_conv=(self.B_conv, B), C_conv=(self.C_conv, C)
        )  # fmt: skip
        x, B, C = x.unflatten(-1, (-1, o.head_dim)), self._groups(B), self._groups(C)
        inputs = (x, dt, -at_least_fp32(self.A_log).exp(), B, C, at_least_fp32(self.D))
        dt_bias = at_least_fp32(self.dt_bias)
        if self.state_control is not None and not self.training:
            x, dt, A, B, C, D = inputs
            y = self.state_control.ssd(
                x, step_sizes(x, dt, dt_bias, True), A, B, C, D, layout=layout, states=states, chunk_size=o.chunk_size
            )  # fmt: skip
        elif layout.context is not None:
            y = context_ssd(layout.context, *inputs, dt_bias=dt_bias, chunk_size=o.chunk_size)
        else:
            y, state = ssd(
                *inputs, dt_bias=dt_bias, dt_softplus=True,
                initial_state=layout.initial(states, "ssd"), cu_seqlens=layout.cu_seqlens, chunk_size=o.chunk_size,
            )  # fmt: skip
            if states is not None:
                states["ssd"] = layout.last(state)
        y = sharded_rms_norm(y.flatten(2), z, self.norm_weight, self.tp, eps=o.norm_eps, groups=o.num_groups)
        return layout.unflatten(self.o_proj(y))

    def _groups(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, groups · N) → (B, T, G, N), those of this rank's heads: with fewer groups than ranks, one of all."""
        x = x.unflatten(-1, (-1, self.options.state_size))
        if self.options.num_groups >= self.tp.size:
            return x
        group = self.tp.rank * self.options.num_groups // self.tp.size
        return x[:, :, group : group + 1]

    def reset_parameters(self) -> None:
        o = self.options
        init_decay(self.A_log, self.dt_bias, o.A_init_min, o.A_init_max, o.dt_min, o.dt_max, o.dt_floor)
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)

    def parameter_plan(self, tp: int = 1) -> Plan:
        of_groups = 0 if self.options.num_groups >= tp else None  # ranks that share a group have all groups
        plan: Plan = {"z_proj.weight": 0, "dt_proj.weight": 0}
        for name, split in (("x", 0), ("B", of_groups), ("C", of_groups)):
            plan |= {f"{name}_proj.weight": split, f"{name}_conv.weight": split}
            if self.options.conv_bias:
                plan[f"{name}_conv.bias"] = split
        return plan | {"A_log": 0, "dt_bias": 0, "D": 0, "norm_weight": 0, "o_proj.weight": 1}

    def mixing_flops(self, seq_len: int) -> float:
        o = self.options
        chunk = min(o.chunk_size, seq_len)
        scores = 2 * chunk * o.num_groups * o.state_size
        return scores + self.num_heads * o.head_dim * (2 * chunk + 4 * o.state_size)

    def state_bytes(self, seq_len: int) -> int:
        o = self.options
        channels = self.num_heads * o.head_dim + 2 * o.num_groups * o.state_size
        return 4 * self.num_heads * o.head_dim * o.state_size + 2 * (o.conv_kernel - 1) * channels
