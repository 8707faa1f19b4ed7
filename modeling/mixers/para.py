"""ParaGRU and ParaLSTM (Danieli et al. 2025, arXiv 2510.21450): nonlinear RNNs with diagonal recurrent weights.

The block is the paper's: two projections (a branch u and a gate z), a short convolution with SiLU on u, a
block-diagonal input projection to the gates' pre-activations, the cell, RMSNorm, the gate SiLU(z), a projection out.

The paper keeps |a|, |c| ≤ 0.5 in language models, where the parallel solve converges within a few passes; whether by
projection or by clamping is not stated. Here it is a parametrisation, weight = bound · tanh(parameter / bound): close
to the identity for small weights, never past the bound, and with a gradient everywhere.
"""

import math
from abc import abstractmethod

import torch
from torch import nn

from riverrun.kernels.block_linear import block_linear
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm
from riverrun.modeling.layers import RMSNorm, ShortConv, at_least_fp32, short_convs
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import ParaGRUOptions, ParaLSTMOptions
from riverrun.modeling.mixers.base import Mixer, States, register
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.norm import sharded_rms_norm
from riverrun.modeling.parallel.para import Then, context_para_gru, context_para_lstm
from riverrun.modeling.parallel.split import Plan
from riverrun.modeling.projection import project


class BlockDiagonalGates(nn.Module):
    """`num_heads` independent projections of size/num_heads channels to three gates each: (B, T, D) → (B, T, 3, D)."""

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, size // num_heads, 3, size // num_heads))
        self.bias = nn.Parameter(torch.empty(3, size))
        self.bias.no_weight_decay = True  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        bound = math.sqrt(3 / self.weight.shape[1])  # Kaiming uniform, as in the paper's language models
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Without the bias, which the cell adds."""
        return block_linear(x, self.weight)


class _ParaMixer(Mixer):
    context_parallel = True

    def __init__(self, options: ParaGRUOptions | ParaLSTMOptions, hidden_size: int, norm_eps: float):
        super().__init__()
        self.options = options
        self.inner = options.inner_size(hidden_size)
        self.u_proj = nn.Linear(hidden_size, self.inner, bias=False)
        self.z_proj = nn.Linear(hidden_size, self.inner, bias=False)
        self.conv = ShortConv(self.inner, options.conv_kernel, bias=True)
        self.gates = BlockDiagonalGates(self.inner, options.num_heads)
        self.recurrent_weight = _recurrent_parameter(3, self.inner)
        self.norm = RMSNorm(self.inner, options.norm_eps)
        self.o_proj = nn.Linear(self.inner, hidden_size, bias=False)

    @abstractmethod
    def cell(self, gates: torch.Tensor, state: torch.Tensor | None, cu_seqlens: torch.Tensor | None):
        """gates (B, T, 3, D) → h (B, T, D) and the final state."""

    @abstractmethod
    def shared_cell(self, gates: torch.Tensor, context: Context, **then: Then) -> torch.Tensor:
        """The same for rows that several ranks share: this rank's h, or what is then made of it."""

    def forward(self, hidden: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        hidden = layout.flatten(hidden)
        u, z = project(hidden, self.u_proj, self.z_proj)
        (u,) = short_convs(layout, states, conv=(self.conv, u))

        def leave(h: torch.Tensor) -> torch.Tensor:
            y = sharded_rms_norm(h, z, self.norm.weight, self.tp, eps=self.norm.eps, norm_before_gate=True)
            return self.o_proj(y)

        if layout.context is None:
            h, state = self.cell(self.gates(u), layout.initial(states, "cell"), layout.cu_seqlens)
            if states is not None:
                states["cell"] = layout.last(state)
            y = leave(h)
        elif self.tp.size == 1:
            y = self.shared_cell(self.gates(u), layout.context, then=leave)
        else:  # whose norm is a collective
            y = leave(self.shared_cell(self.gates(u), layout.context))
        return layout.unflatten(y)

    def bounded(self, weight: torch.Tensor) -> torch.Tensor:
        bound = self.options.max_recurrent_weight
        return bound * torch.tanh(at_least_fp32(weight) / bound)

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.recurrent_weight)

    def parameter_plan(self, tp: int = 1) -> Plan:
        return {
            "u_proj.weight": 0, "z_proj.weight": 0, "conv.weight": 0, "conv.bias": 0, "gates.weight": 0,
            "gates.bias": 1, "recurrent_weight": 1, "norm.weight": 0, "o_proj.weight": 1,
        }  # fmt: skip


@register("para_gru")
class ParaGRU(_ParaMixer):
    """h_t = (1 − z) h + z n, gates z, r, n; state h."""

    def cell(self, gates, state, cu_seqlens):
        return para_gru(
            gates, self.bounded(self.recurrent_weight), bias=self.gates.bias, initial_state=state,
            cu_seqlens=cu_seqlens, tolerance=self.options.tolerance,
        )  # fmt: skip

    def shared_cell(self, gates, context, **then):
        return context_para_gru(
            context, gates, self.bounded(self.recurrent_weight), bias=self.gates.bias,
            tolerance=self.options.tolerance, **then,
        )  # fmt: skip

    def mixing_flops(self, seq_len: int) -> float:
        return 20.0 * self.inner  # one sequential evaluation of the cell, a transcendental counted as one

    def state_bytes(self, seq_len: int) -> int:
        return (4 + 2 * (self.options.conv_kernel - 1)) * self.inner


@register("para_lstm")
class ParaLSTM(_ParaMixer):
    """Coupled forget and input gates with peepholes, gates f, o, c; state c, h."""

    def __init__(self, options: ParaLSTMOptions, hidden_size: int, norm_eps: float):
        super().__init__(options, hidden_size, norm_eps)
        self.peephole = _recurrent_parameter(2, self.inner)

    def cell(self, gates, state, cu_seqlens):
        return para_lstm(
            gates, self.bounded(self.recurrent_weight), self.bounded(self.peephole), bias=self.gates.bias,
            initial_state=state, cu_seqlens=cu_seqlens, tolerance=self.options.tolerance,
        )  # fmt: skip

    def shared_cell(self, gates, context, **then):
        return context_para_lstm(
            context, gates, self.bounded(self.recurrent_weight), self.bounded(self.peephole), bias=self.gates.bias,
            tolerance=self.options.tolerance, **then,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_normal_(self.peephole)

    def parameter_plan(self, tp: int = 1) -> Plan:
        return super().parameter_plan(tp) | {"peephole": 1}

    def mixing_flops(self, seq_len: int) -> float:
        return 24.0 * self.inner

    def state_bytes(self, seq_len: int) -> int:
        return (8 + 2 * (self.options.conv_kernel - 1)) * self.inner


def _recurrent_parameter(rows: int, size: int) -> nn.Parameter:
    param = nn.Parameter(torch.empty(rows, size))
    param.no_weight_decay = True  # type: ignore[attr-defined]
    return param
