"""Titans' blocks of a memory and attention (arXiv 2501.00663, §4): the memory as a gate of attention (MAG), and as the
layer before it (MAL). The memory as a context (MAC) is in `titans_mac.py`.

Persistent tokens are shared by the two: the memory is written with them before every sequence, and attention has keys
and values of them, which have no position and every query sees. The paper leaves open what its gate is; here both
branches are normed per head, by a vector each, and what the memory says passes a sigmoid.
"""

import torch
from torch import nn

from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.modeling.layout import Layout, rotary_tables
from riverrun.modeling.memory_options import TitansMACOptions, TitansMAGOptions
from riverrun.modeling.mixers.attention import rotate
from riverrun.modeling.mixers.base import States, register
from riverrun.modeling.mixers.neural_memory import MemoryMixer
from riverrun.modeling.parallel.split import Plan
from riverrun.modeling.projection import project
from riverrun.modeling.titans_attention import running_positions, window_attention


class TitansBlock(MemoryMixer):
    """What the three have in common besides a memory: a norm of what attention says, which has an output gate if there
    is one."""

    options: TitansMAGOptions | TitansMACOptions

    def __init__(self, options: TitansMAGOptions | TitansMACOptions, hidden_size: int, norm_eps: float):
        super().__init__(options, hidden_size, norm_eps)
        self.attention_norm_weight = nn.Parameter(torch.empty(options.head_dim))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(…, H · D) → (…, H, D)"""
        return x.unflatten(-1, (-1, self.options.head_dim))

    def turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (B, H, T, D) by the rotary angles of positions (B, T)."""
        o = self.options
        return rotate(x, *rotary_tables(positions, o.head_dim, o.rope_theta, x.dtype)) if o.rope else x

    def attention_output(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y (B, T, H, D), normed, by the output gate of x (B, T, hidden_size)."""
        o = self.options
        gate = self.heads(self.g_proj(x)) if o.output_gate else None
        return gated_rms_norm(y, gate, self.attention_norm_weight, eps=o.norm_eps, norm_before_gate=True)

    def memory_output(self, m: torch.Tensor) -> torch.Tensor:
        """m (B, T, H, D), normed."""
        return gated_rms_norm(m, None, self.norm_weight, eps=self.options.norm_eps)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.attention_norm_weight)

    def parameter_plan(self, tp: int = 1) -> Plan:
        return super().parameter_plan(tp) | {"attention_norm_weight": None}


class TitansProjections(TitansBlock):
    """One whose attention projects the block's input, persistent tokens too."""

    def __init__(self, options: TitansMAGOptions | TitansMACOptions, hidden_size: int, norm_eps: float):
        super().__init__(options, hidden_size, norm_eps)
        channels = options.num_heads * options.head_dim
        self.q_proj = nn.Linear(hidden_size, channels, bias=False)
        self.k_proj = nn.Linear(hidden_size, channels, bias=False)
        self.v_proj = nn.Linear(hidden_size, channels, bias=False)

    def persistent_keys(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """And values: (H, P, D)."""
        if not self.options.num_persistent:
            return None, None
        k, v = (self.heads(x).transpose(0, 1) for x in project(self.persistent, self.k_proj, self.v_proj))
        return k, v

    def parameter_plan(self, tp: int = 1) -> Plan:
        return super().parameter_plan(tp) | {"q_proj.weight": 0, "k_proj.weight": 0, "v_proj.weight": 0}


class _Windowed(TitansBlock):
    options: TitansMAGOptions

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        persistent: tuple[torch.Tensor | None, torch.Tensor | None],
        layout: Layout,
        states: States | None,
    ) -> torch.Tensor:
        """q, k, v (B, T, H, D), persistent keys and values (H, P, D) → (B, T, H, D)"""
        positions = running_positions(layout, states)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = self.turned(q, positions), self.turned(k, positions)
        y = window_attention(q, k, v, *persistent, self.options.attention_window, positions, layout, states)
        return y.transpose(1, 2)

    def remember(self, x: torch.Tensor, layout: Layout, states: States | None) -> torch.Tensor:
        """x (B, T, hidden_size) → what the memory says, (B, T, H, D)."""
        persistent = self.persistent if self.options.num_persistent else None
        parts, _ = self.memory.project(layout.flatten(x))
        return layout.unflatten(self.memory(parts, layout, states, persistent))

    def mixing_flops(self, seq_len: int) -> float:
        o = self.options
        window = min(o.attention_window, seq_len)
        keys = window - window * (window - 1) / (2 * seq_len)  # that a query sees, averaged over the sequence
        return super().mixing_flops(seq_len) + 4 * o.num_heads * o.head_dim * keys

    def state_bytes(self, seq_len: int) -> int:
        o = self.options
        return super().state_bytes(seq_len) + 4 + 2 * 2 * (o.attention_window - 1) * o.num_heads * o.head_dim


@register("titans_mag")
class TitansMAG(_Windowed, TitansProjections):
    """RMSNorm(attention(x)) ∘ σ(RMSNorm(memory(x))), of the same x (§4.2)."""

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        m = self.remember(x, layout, states)
        q, k, v = (self.heads(part) for part in project(x, self.q_proj, self.k_proj, self.v_proj))
        y = self.attend(q, k, v, self.persistent_keys(), layout, states)
        return self.o_proj((self.attention_output(y, x) * self.memory_output(m).sigmoid()).flatten(2))

    def mixing_flops(self, seq_len: int) -> float:
        o = self.options
        return super().mixing_flops(seq_len) + 4 * o.num_heads * o.head_dim * o.num_persistent


@register("titans_mal")
class TitansMAL(_Windowed):
    """attention(RMSNorm(memory(x))), normed and gated as a memory alone is (§4.3).

    Each head of attention makes its queries, keys and values of one head of the memory: maps of all heads would gather
    them from all tensor-parallel ranks. Its persistent keys and values are parameters of their own, because persistent
    tokens are as wide as the block's input, and not as a head.
    """

    def __init__(self, options: TitansMAGOptions, hidden_size: int, norm_eps: float):
        super().__init__(options, hidden_size, norm_eps)
        H, D, P = options.num_heads, options.head_dim, options.num_persistent
        self.q_weight = nn.Parameter(torch.empty(H, D, D))
        self.k_weight = nn.Parameter(torch.empty(H, D, D))
        self.v_weight = nn.Parameter(torch.empty(H, D, D))
        self.persistent_k = nn.Parameter(torch.empty(H, P, D)) if P else None
        self.persistent_v = nn.Parameter(torch.empty(H, P, D)) if P else None

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        m = self.memory_output(self.remember(x, layout, states))
        q, k, v = (per_head(m, weight) for weight in (self.q_weight, self.k_weight, self.v_weight))
        y = self.attend(q, k, v, (self.persistent_k, self.persistent_v), layout, states)
        return self.o_proj(self.attention_output(y, x).flatten(2))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in (self.q_weight, self.k_weight, self.v_weight):
            nn.init.normal_(weight, std=self.options.head_dim**-0.5)
        for persistent in (self.persistent_k, self.persistent_v):
            if persistent is not None:
                nn.init.normal_(persistent)

    def parameter_plan(self, tp: int = 1) -> Plan:
        own = ["q_weight", "k_weight", "v_weight"]
        if self.options.num_persistent:
            own += ["persistent_k", "persistent_v"]
        return super().parameter_plan(tp) | dict.fromkeys(own, 0)


def per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) by a map of each head, (H, D, E)."""
    return torch.einsum("bthd,hde->bthe", x, weight)
