"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) and gated DeltaProduct (Siems et al. 2025, arXiv 2502.10297)."""

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.kernels.gated_delta import gated_delta
from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.modeling.layers import ShortConv, at_least_fp32, fp32_parameter, init_decay, short_convs
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import GatedDeltaOptions
from riverrun.modeling.mixers.base import Mixer, States, register
from riverrun.modeling.parallel.linear import context_gated_delta
from riverrun.modeling.parallel.split import Plan, Split
from riverrun.modeling.projection import project


@register("gated_delta")
class GatedDelta(Mixer):
    """n Householder steps a token: keys, values and β of step j are channels (j, head, ·) of their projections."""

    context_parallel = True

    def __init__(self, options: GatedDeltaOptions, hidden_size: int, norm_eps: float):
        super().__init__()
        self.options = options
        H, n, K, V = options.num_heads, options.num_householder, options.head_dim, options.value_dim
        self.q_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.k_proj = nn.Linear(hidden_size, n * H * K, bias=False)
        self.v_proj = nn.Linear(hidden_size, n * H * V, bias=False)
        self.b_proj = nn.Linear(hidden_size, n * H, bias=False)
        self.q_conv = ShortConv(H * K, options.conv_kernel, bias=False)
        self.k_conv = ShortConv(n * H * K, options.conv_kernel, bias=False)
        self.v_conv = ShortConv(n * H * V, options.conv_kernel, bias=False)
        if options.use_gate:
            self.a_proj = nn.Linear(hidden_size, H, bias=False)
            self.A_log = fp32_parameter(H)
            self.dt_bias = fp32_parameter(H)
        if options.output_gate:
            self.g_proj = nn.Linear(hidden_size, H * V, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(V))
        self.o_proj = nn.Linear(H * V, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        o = self.options
        n, K, V = o.num_householder, o.head_dim, o.value_dim
        hidden = layout.flatten(hidden)
        names = "qkvb" + "a" * o.use_gate + "g" * o.output_gate
        parts = dict(zip(names, project(hidden, *(getattr(self, f"{name}_proj") for name in names))))
        q, k, v = short_convs(
            layout, states, q_conv=(self.q_conv, parts["q"]), k_conv=(self.k_conv, parts["k"]),
            v_conv=(self.v_conv, parts["v"]),
        )  # fmt: skip
        q, k, v = q.unflatten(-1, (-1, K)), k.unflatten(-1, (n, -1, K)), v.unflatten(-1, (n, -1, V))
        beta = at_least_fp32(parts["b"]).sigmoid().unflatten(-1, (n, -1))
        if o.allow_neg_eigval:
            beta = 2 * beta
        g = None
        if o.use_gate:
            dt = F.softplus(at_least_fp32(parts["a"]) + at_least_fp32(self.dt_bias))
            g = -at_least_fp32(self.A_log).exp() * dt
        beta_max = 2.0 if o.allow_neg_eigval else 1.0
        if layout.context is not None:
            y = context_gated_delta(layout.context, q, k, v, beta, g, beta_max=beta_max, chunk_size=o.chunk_size)
        else:
            y, state = gated_delta(
                q, k, v, beta, g, qk_l2norm=True, beta_max=beta_max,
                initial_state=layout.initial(states, "delta"), cu_seqlens=layout.cu_seqlens, chunk_size=o.chunk_size,
            )  # fmt: skip
            if states is not None:
                states["delta"] = layout.last(state)
        gate = parts["g"].unflatten(-1, (-1, V)) if o.output_gate else None
        y = gated_rms_norm(y, gate, self.norm_weight, eps=o.norm_eps, norm_before_gate=True)
        return layout.unflatten(self.o_proj(y.flatten(2)))

    def reset_parameters(self) -> None:
        o = self.options
        if o.use_gate:
            init_decay(self.A_log, self.dt_bias, o.A_init_min, o.A_init_max, o.dt_min, o.dt_max, o.dt_floor)
        nn.init.ones_(self.norm_weight)

    def parameter_plan(self, tp: int = 1) -> Plan:
        steps = Split(0, blocks=self.options.num_householder)
        plan: Plan = {"q_proj.weight": 0, "q_conv.weight": 0}
        plan |= {f"{n}_proj.weight": steps for n in "kvb"}
        plan |= {f"{n}_conv.weight": steps for n in "kv"}
        if self.options.use_gate:
            plan |= {"a_proj.weight": 0, "A_log": 0, "dt_bias": 0}
        if self.options.output_gate:
            plan["g_proj.weight"] = 0
        return plan | {"norm_weight": None, "o_proj.weight": 1}

    def mixing_flops(self, seq_len: int) -> float:
        o = self.options
        chunk = min(o.chunk_size, seq_len * o.num_householder)  # sub-steps that share one triangular solve
        step = 4 * o.head_dim * o.value_dim + 2 * chunk * (2 * o.head_dim + o.value_dim)
        read = 2 * o.head_dim * o.value_dim + 2 * chunk * (o.head_dim + o.value_dim)
        return o.num_heads * (o.num_householder * step + read)

    def state_bytes(self, seq_len: int) -> int:
        o = self.options
        channels = o.num_heads * (o.head_dim + o.num_householder * (o.head_dim + o.value_dim))
        return 4 * o.num_heads * o.head_dim * o.value_dim + 2 * (o.conv_kernel - 1) * channels
