"""Prefix linear attention (Arora et al. 2024, "Just Read Twice", arXiv 2407.05483): the mixer of JRT-RNN."""

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.kernels.ssd import ssd, ssd_summary
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import PrefixLinearAttentionOptions
from riverrun.modeling.mixers.base import Mixer, States, register
from riverrun.modeling.parallel.linear import context_ssd
from riverrun.modeling.parallel.split import Plan
from riverrun.modeling.projection import project

SUM_CHUNK = 256  # tokens that are summed in one product: each makes a state, which takes memory
EPS = 1e-12  # of the denominator, which is at least half of the number of keys


@register("prefix_linear_attention")
class PrefixLinearAttention(Mixer):
    """Linear attention whose state holds a whole prefix from the start. With φ (`features`) of the queries q, the keys
    k and values v of a decoder, of all tokens, and those of an encoder, of the M tokens of the prefix,

        y_i = S_i φ(q_i) / z_i φ(q_i),   S_i = Σ_{j≤M} vᵉ_j φ(kᵉ_j)ᵀ + Σ_{j≤i} v_j φ(k_j)ᵀ,   z_i the same with v = 1

    so that tokens of the prefix see those of it that come later. `layout.prefix` says which they are; without one there
    is no sum over the prefix, and the layer is causal. Decoding goes on from S and z as in causal linear attention.

    It is the recurrence of `ssd` without decay, A = 0 and Δ = 1: the sums over the prefix are its initial state, and
    the denominator is one more value, which is always 1.
    """

    context_parallel = True  # in causal rows; the model refuses a prefix there

    def __init__(self, options: PrefixLinearAttentionOptions, hidden_size: int, norm_eps: float):
        super().__init__()
        self.options = options
        keys, values = options.num_heads * options.feature_dim, options.num_heads * options.head_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        if options.encoder:
            self.encoder_k_proj = nn.Linear(hidden_size, keys, bias=False)
            self.encoder_v_proj = nn.Linear(hidden_size, values, bias=False)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        o = self.options
        x = layout.flatten(x)
        initial = layout.initial(states, "linear")
        if layout.prefix is None or not o.encoder:
            q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        else:
            assert layout.context is None and initial is None
            layers = self.q_proj, self.k_proj, self.v_proj, self.encoder_k_proj, self.encoder_v_proj
            q, k, v, encoder_k, encoder_v = project(x, *layers)
            prefix = layout.flatten(layout.prefix)
            initial = prefix_state(self._features(encoder_k), self._values(encoder_v), prefix, layout.cu_seqlens)
        q, k, v = self._features(q), self._features(k), self._values(v)
        dt, A = q.new_ones(q.shape[:3]), q.new_zeros(q.shape[2], dtype=torch.float32)
        if layout.context is not None:
            y = context_ssd(layout.context, v, dt, A, k, q, dt_softplus=False, chunk_size=o.chunk_size)
        else:
            y, state = ssd(
                v, dt, A, k, q, initial_state=initial, cu_seqlens=layout.cu_seqlens, chunk_size=o.chunk_size
            )  # fmt: skip
            if states is not None:
                states["linear"] = layout.last(state)
        return layout.unflatten(self.o_proj(normalised(y).flatten(2)))

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H · d) → (B, T, H, N)."""
        return features(x.unflatten(-1, (-1, self.options.feature_dim)))

    def _values(self, v: torch.Tensor) -> torch.Tensor:
        """(B, T, H · P) → (B, T, H, P + 1)."""
        return with_ones(v.unflatten(-1, (-1, self.options.head_dim)))

    def reset_parameters(self) -> None:
        pass  # only child layers

    def parameter_plan(self, tp: int = 1) -> Plan:
        names = ("q", "k", "v", "encoder_k", "encoder_v") if self.options.encoder else ("q", "k", "v")
        plan: Plan = {f"{name}_proj.weight": 0 for name in names}
        return plan | {"o_proj.weight": 1}

    def mixing_flops(self, seq_len: int) -> float:
        """Of causal rows: each token of a prefix takes the features of another key and 2 N (P + 1) a head more."""
        o = self.options
        chunk, N = min(o.chunk_size, seq_len), o.num_features
        scores, values = 2 * chunk * N, (o.head_dim + 1) * (2 * chunk + 4 * N)
        return o.num_heads * (2 * 3 * N + scores + values)

    def state_bytes(self, seq_len: int) -> int:
        o = self.options
        return 4 * o.num_heads * (o.head_dim + 1) * o.num_features


def features(x: torch.Tensor) -> torch.Tensor:
    """φ: x (…, d) → (…, 1 + d + d (d + 1) / 2), such that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k / √d: exp(s) to the
    second order. Of the products of two different channels, which are equal in both orders, one stands for both."""
    d = x.shape[-1]
    first, second = torch.triu_indices(d, d, device=x.device)
    channels = torch.eye(d, dtype=x.dtype, device=x.device)
    scale = 1 - (1 - 0.5**0.5) * (first == second).to(x.dtype)
    flat = (x * d**-0.25).reshape(-1, d)
    # picked by products with unit vectors, whose gradients need no scattering
    pairs = (flat @ channels[first].T) * (flat @ (channels[second].T * scale))
    return torch.cat([torch.ones_like(flat[:, :1]), flat, pairs], dim=-1).view(*x.shape[:-1], -1)


def with_ones(v: torch.Tensor) -> torch.Tensor:
    """A 1 behind the values of each head, (…, P) → (…, P + 1): its sum is the denominator."""
    return F.pad(v, (0, 1), value=1.0)


def normalised(y: torch.Tensor) -> torch.Tensor:
    """The sums over values (…, P + 1) by their last one, which is of ones → (…, P)."""
    return y[..., :-1] / (y[..., -1:] + EPS)


def prefix_state(
    k: torch.Tensor, v: torch.Tensor, prefix: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Σ_j v_j k_jᵀ over the tokens of each sequence's prefix, (S, H, P, N) in float32, or float64 if they are.

    Args:
        k: (B, T, H, N).
        v: (B, T, H, P).
        prefix: (B, T) bool.
        cu_seqlens: bounds of packed sequences, B = 1; None: rows are sequences.
    """
    within = prefix[..., None].to(k.dtype).expand(k.shape[:3])
    no_decay = k.new_zeros(k.shape[2], dtype=torch.float32)
    return ssd_summary(v, within, no_decay, k, cu_seqlens=cu_seqlens, chunk_size=SUM_CHUNK)[1]
