"""Softmax attention: full or sliding window, grouped queries, rotary positions or none."""

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.modeling.attention_block import self_attention
from riverrun.modeling.layers import RMSNorm
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import AttentionOptions
from riverrun.modeling.mixers.base import Mixer, States, register
from riverrun.modeling.parallel.attention import context_attention
from riverrun.modeling.parallel.mesh import ALONE, Axis
from riverrun.modeling.parallel.norm import sharded_rms_norm
from riverrun.modeling.parallel.split import Plan
from riverrun.modeling.projection import project


@register("attention")
class Attention(Mixer):
    """Causal attention through torch's SDPA and flash kernels. Their gradient of q on CUDA differs in the last bits
    from run to run."""

    context_parallel = True
    traceable = True

    def __init__(self, options: AttentionOptions, hidden_size: int, norm_eps: float):
        super().__init__()
        self.options = options
        heads, kv_heads, dim = options.num_heads, options.num_kv_heads, options.head_dim
        self.q_proj = nn.Linear(hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden_size, bias=False)
        if options.qk_bias:
            self.q_bias = nn.Parameter(torch.empty(heads * dim))
            self.k_bias = nn.Parameter(torch.empty(kv_heads * dim))
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if options.qk_norm != "none":
            per_head = options.qk_norm == "head"
            self.q_norm = RMSNorm(dim if per_head else heads * dim, norm_eps)
            self.k_norm = RMSNorm(dim if per_head else kv_heads * dim, norm_eps)

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        if self.options.qk_bias:
            q, k = q + self.q_bias.to(q.dtype), k + self.k_bias.to(k.dtype)
        of_kv = self.tp if self._splits_kv(self.tp.size) else ALONE
        q = self._heads(q, self.q_norm, self.tp)  # (B, H, T, head_dim)
        k = self._heads(k, self.k_norm, of_kv)  # (B, H_kv, T, head_dim)
        v = self._heads(v, None, of_kv)
        if of_kv is not self.tp:  # several ranks share a head of k and v, and each has all of them
            head = self.tp.rank * self.options.num_kv_heads // self.tp.size
            k, v = k[:, head : head + 1], v[:, head : head + 1]
        if layout.rope is not None:
            q, k = rotate(q, *layout.rope), rotate(k, *layout.rope)
        if states is not None:
            if states:
                k, v = torch.cat([states["k"], k], dim=2), torch.cat([states["v"], v], dim=2)
            window = self.options.window
            keep = k.shape[2] if window is None else min(k.shape[2], window - 1)
            states["k"], states["v"] = k[:, :, k.shape[2] - keep :], v[:, :, v.shape[2] - keep :]
        if layout.context is not None:
            y = context_attention(layout, q, k, v, self.options.window)
        elif k.shape[2] > q.shape[2]:  # there were cached tokens
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, enable_gqa=True)
        else:
            y = self_attention(q, k, v, self.options.window, layout.cu_seqlens, layout.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _splits_kv(self, tp: int) -> bool:
        return self.options.num_kv_heads % tp == 0

    def _heads(self, x: torch.Tensor, norm: RMSNorm | None, tp: Axis) -> torch.Tensor:
        if norm is not None and self.options.qk_norm == "full":
            x = norm(x) if tp.size == 1 else sharded_rms_norm(x, None, norm.weight, tp, eps=norm.eps)
        x = x.unflatten(-1, (-1, self.options.head_dim)).transpose(1, 2)
        if norm is not None and self.options.qk_norm == "head":
            x = norm(x)
        return x

    def reset_parameters(self) -> None:
        if self.options.qk_bias:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.k_bias)

    def parameter_plan(self, tp: int = 1) -> Plan:
        of_kv = 0 if self._splits_kv(tp) else None
        plan: Plan = {"q_proj.weight": 0, "k_proj.weight": of_kv, "v_proj.weight": of_kv, "o_proj.weight": 1}
        if self.options.qk_bias:
            plan |= {"q_bias": 0, "k_bias": of_kv}
        if self.options.qk_norm != "none":
            full = self.options.qk_norm == "full"
            plan |= {"q_norm.weight": 0 if full else None, "k_norm.weight": of_kv if full else None}
        return plan

    def mixing_flops(self, seq_len: int) -> float:
        window = min(self.options.window or seq_len, seq_len)
        keys = window - window * (window - 1) / (2 * seq_len)  # keys a query sees, averaged over the sequence
        return 4 * self.options.num_heads * self.options.head_dim * keys

    def state_bytes(self, seq_len: int) -> int:
        tokens = seq_len if self.options.window is None else min(seq_len, self.options.window - 1)
        return 2 * 2 * tokens * self.options.num_kv_heads * self.options.head_dim


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn channel i with channel i + head_dim/2 by the rotary angle; x (B, H, T, head_dim)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin
