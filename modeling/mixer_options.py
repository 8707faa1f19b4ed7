"""The options of each token mixer: one frozen dataclass a mixer, named as in the papers.

`0` for a size means "derived from the model's width" by the rule in the field's comment; `resolve` writes the derived
value in, so that a saved config is explicit. Every `problems` method lists all violations at once, each with its fix.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from riverrun.modeling.memory_options import MEMORY_OPTIONS, MemoryOptions
from riverrun.modeling.option_problems import divisor_near, not_shared, positive


@dataclass(frozen=True)
class AttentionOptions:
    """Softmax attention with grouped queries (GQA), full or in a sliding window, rotary positions or none."""

    __pydantic_config__ = {"extra": "forbid"}

    num_heads: int = 0  # hidden_size / head_dim
    num_kv_heads: int = 0  # num_heads (no grouping)
    head_dim: int = 64
    window: int | None = None  # tokens each query sees, itself included; None: all
    rope: bool = True  # rotary positions; False is "NoPE", common in hybrids
    rope_theta: float = 10_000.0
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm on q and k, per head or over the full width
    qk_bias: bool = False  # learned biases of q and k (not of v), before their norms and rotation (Huginn)

    def resolve(self, hidden_size: int) -> "AttentionOptions":
        num_heads = self.num_heads or max(1, hidden_size // self.head_dim)
        return replace(self, num_heads=num_heads, num_kv_heads=self.num_kv_heads or num_heads)

    def tp_problems(self, hidden_size: int, tp: int) -> list[str]:
        found = not_shared("attention.num_heads", self.num_heads, tp)
        if not found and self.num_kv_heads % tp and tp % self.num_kv_heads:
            found.append(
                f"attention.num_kv_heads={self.num_kv_heads} must be a multiple of parallel.tp={tp}, or a divisor of it"
            )
        return found

    def problems(self, hidden_size: int) -> list[str]:
        found = []
        if self.head_dim < 2 or self.head_dim % 2:
            found.append(f"attention.head_dim={self.head_dim} must be even (rotary positions turn pairs of channels)")
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % max(1, self.num_kv_heads):
            found.append(
                f"attention.num_heads={self.num_heads} must be a positive multiple of "
                f"attention.num_kv_heads={self.num_kv_heads}"
            )
        if self.window is not None and self.window < 1:
            found.append(f"attention.window={self.window} must be at least 1 token, or left out for full attention")
        if self.rope_theta <= 0:
            found.append(f"attention.rope_theta={self.rope_theta} must be positive; 10000 is usual")
        return found


@dataclass(frozen=True)
class _DecayOptions:
    """How the decay exp(−A · dt) starts in Mamba-2 and gated DeltaNet: A uniform, dt log-uniform with a floor."""

    A_init_min: float = 1.0
    A_init_max: float = 16.0
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4

    def decay_problems(self, mixer: str) -> list[str]:
        found = []
        if not 0 < self.A_init_min <= self.A_init_max:
            found.append(f"{mixer}.A_init_min and A_init_max must satisfy 0 < min ≤ max; the paper has 1, 16")
        if not 0 < self.dt_min <= self.dt_max:
            found.append(f"{mixer}.dt_min and dt_max must satisfy 0 < min ≤ max; the paper has 0.001, 0.1")
        return found


@dataclass(frozen=True)
class Mamba2Options(_DecayOptions):
    """Mamba-2 (Dao & Gu 2024, arXiv 2405.21060)."""

    __pydantic_config__ = {"extra": "forbid"}

    expand: int = 2  # inner width / hidden_size
    head_dim: int = 64  # P
    state_size: int = 128  # N
    num_groups: int = 1  # G: heads that share B and C
    conv_kernel: int = 4
    conv_bias: bool = True
    norm_eps: float = 1e-5
    chunk_size: int = 64

    def resolve(self, hidden_size: int) -> "Mamba2Options":
        return self

    def tp_problems(self, hidden_size: int, tp: int) -> list[str]:
        heads = self.expand * hidden_size // self.head_dim
        found = not_shared("mamba2's heads, expand × hidden_size / head_dim", heads, tp)
        if self.num_groups % tp and tp % self.num_groups:
            found.append(
                f"mamba2.num_groups={self.num_groups} must be a multiple of parallel.tp={tp}, or a divisor of it"
            )
        return found

    def problems(self, hidden_size: int) -> list[str]:
        found = positive("mamba2", self, "expand", "head_dim", "state_size", "num_groups", "conv_kernel", "chunk_size")
        if found:
            return found
        inner = self.expand * hidden_size
        if inner % self.head_dim:
            found.append(
                f"mamba2.head_dim={self.head_dim} must divide mamba2.expand × hidden_size = {inner}; "
                f"try {divisor_near(inner, self.head_dim)}"
            )
        elif (inner // self.head_dim) % self.num_groups:
            found.append(
                f"mamba2.num_groups={self.num_groups} must divide the {inner // self.head_dim} heads "
                f"(expand × hidden_size / head_dim)"
            )
        return found + self.decay_problems("mamba2")


@dataclass(frozen=True)
class GatedDeltaOptions(_DecayOptions):
    """Gated DeltaNet (arXiv 2412.06464) and, with more than one Householder step, gated DeltaProduct (2502.10297)."""

    __pydantic_config__ = {"extra": "forbid"}

    num_heads: int = 0  # 0.75 · hidden_size / head_dim, the papers' sizing, at least 1
    head_dim: int = 128  # K
    expand_v: float = 2.0  # V / K
    num_householder: int = 1  # n: Householder steps a token
    allow_neg_eigval: bool = True  # β in [0, 2] instead of [0, 1]: transitions with eigenvalues in [-1, 1]
    use_gate: bool = True  # the decay α; False is DeltaNet / DeltaProduct
    output_gate: bool = True
    conv_kernel: int = 4
    norm_eps: float = 1e-5
    chunk_size: int = 64

    @property
    def value_dim(self) -> int:
        return int(self.head_dim * self.expand_v)

    def resolve(self, hidden_size: int) -> "GatedDeltaOptions":
        return replace(self, num_heads=self.num_heads or max(1, 3 * hidden_size // (4 * self.head_dim)))

    def tp_problems(self, hidden_size: int, tp: int) -> list[str]:
        return not_shared("gated_delta.num_heads", self.num_heads, tp)

    def problems(self, hidden_size: int) -> list[str]:
        found = positive("gated_delta", self, "num_heads", "head_dim", "num_householder", "conv_kernel", "chunk_size")
        if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
            found.append(
                f"gated_delta.expand_v={self.expand_v} × head_dim={self.head_dim} must be a whole number of channels"
            )
        return found + self.decay_problems("gated_delta")


@dataclass(frozen=True)
class PrefixLinearAttentionOptions:
    """Prefix linear attention (JRT-RNN, arXiv 2407.05483): a prefix may be read without causality."""

    __pydantic_config__ = {"extra": "forbid"}

    num_heads: int = 0  # hidden_size / head_dim
    head_dim: int = 64  # of the values
    feature_dim: int = 16  # d: of queries and keys, before their second-order features; the kernels take up to 21
    encoder: bool = True  # keys and values of a prefix; False: causal linear attention, as in Based (2402.18668)
    chunk_size: int = 64

    @property
    def num_features(self) -> int:
        return 1 + self.feature_dim + self.feature_dim * (self.feature_dim + 1) // 2

    def resolve(self, hidden_size: int) -> "PrefixLinearAttentionOptions":
        return replace(self, num_heads=self.num_heads or max(1, hidden_size // max(1, self.head_dim)))

    def tp_problems(self, hidden_size: int, tp: int) -> list[str]:
        return not_shared("prefix_linear_attention.num_heads", self.num_heads, tp)

    def problems(self, hidden_size: int) -> list[str]:
        return positive("prefix_linear_attention", self, "num_heads", "head_dim", "feature_dim", "chunk_size")


@dataclass(frozen=True)
class _ParaOptions:
    """What the two ParaRNN cells (arXiv 2510.21450) share."""

    __pydantic_config__ = {"extra": "forbid"}

    expand: float = 1.0  # inner width / hidden_size
    num_heads: int = 4  # blocks of the block-diagonal input projection; the recurrence itself is per channel
    conv_kernel: int = 4
    max_recurrent_weight: float = 0.5  # bound on |a|, |c| by a tanh parametrisation; the paper's LM recipe has 0.5
    norm_eps: float = 1e-5
    tolerance: float = 1e-5  # largest change at a chunk boundary that counts as converged

    @property
    def name(self) -> str:
        return "para"

    def inner_size(self, hidden_size: int) -> int:
        return int(hidden_size * self.expand)

    def resolve(self, hidden_size: int):
        return self

    def tp_problems(self, hidden_size: int, tp: int) -> list[str]:
        return not_shared(f"{self.name}.num_heads", self.num_heads, tp)

    def problems(self, hidden_size: int) -> list[str]:
        found = positive(self.name, self, "num_heads", "conv_kernel", "max_recurrent_weight", "tolerance", "expand")
        if not found and self.inner_size(hidden_size) % self.num_heads:
            found.append(
                f"{self.name}.num_heads={self.num_heads} must divide expand × hidden_size = "
                f"{self.inner_size(hidden_size)}; try {divisor_near(self.inner_size(hidden_size), self.num_heads)}"
            )
        return found


@dataclass(frozen=True)
class ParaGRUOptions(_ParaOptions):
    """ParaGRU: a GRU with diagonal recurrent weights, trained in parallel over time."""

    @property
    def name(self) -> str:
        return "para_gru"


@dataclass(frozen=True)
class ParaLSTMOptions(_ParaOptions):
    """ParaLSTM: a coupled-gate (CIFG) LSTM with diagonal recurrent weights and peepholes."""

    @property
    def name(self) -> str:
        return "para_lstm"


@dataclass(frozen=True)
class HeadRNNOptions:
    """What the RNNs with dense recurrent matrices, one a head and gate, share (arXiv 2412.07752)."""

    __pydantic_config__ = {"extra": "forbid"}

    name: ClassVar[str]

    expand: float = 1.0  # inner width / hidden_size
    head_dim: int = 64  # K: inner width / heads; the kernels keep the recurrent matrices on chip up to 128
    conv_kernel: int = 4  # 0: no convolution (and no SiLU after it)
    recurrent_init: float = 1.0  # recurrent weights start uniform within ± this / sqrt(K); 0: at zero
    norm_eps: float = 1e-5

    def inner_size(self, hidden_size: int) -> int:
        return int(hidden_size * self.expand)

    def resolve(self, hidden_size: int):
        return self

    def tp_problems(self, hidden_size: int, tp: int) -> list[str]:
        heads = self.inner_size(hidden_size) // self.head_dim
        return not_shared(f"{self.name}'s heads, expand × hidden_size / head_dim", heads, tp)

    def problems(self, hidden_size: int) -> list[str]:
        found = positive(self.name, self, "expand", "head_dim")
        for n in ("conv_kernel", "recurrent_init"):
            if getattr(self, n) < 0:
                found.append(f"{self.name}.{n}={getattr(self, n)} must not be negative; 0 is none")
        if not found and self.inner_size(hidden_size) % self.head_dim:
            found.append(
                f"{self.name}.head_dim={self.head_dim} must divide expand × hidden_size = "
                f"{self.inner_size(hidden_size)}; try {divisor_near(self.inner_size(hidden_size), self.head_dim)}"
            )
        return found


@dataclass(frozen=True)
class ElmanOptions(HeadRNNOptions):
    """The simple RNN (Elman 1990) with block-diagonal recurrent weights, a block a head."""

    name: ClassVar[str] = "elman"


@dataclass(frozen=True)
class _ForgettingOptions(HeadRNNOptions):
    """Head RNNs with a gate that keeps the state."""

    forget_bias_min: float = 0.0  # the keeping gate's biases start evenly spaced over the channels of each head
    forget_bias_max: float = 6.0  # a channel keeps its state for about exp(bias) tokens: 1 to 400 (arXiv 1804.11188)

    def problems(self, hidden_size: int) -> list[str]:
        found = super().problems(hidden_size)
        if self.forget_bias_min > self.forget_bias_max:
            found.append(
                f"{self.name}.forget_bias_min={self.forget_bias_min} must not be above "
                f"{self.name}.forget_bias_max={self.forget_bias_max}"
            )
        return found


@dataclass(frozen=True)
class GRUOptions(_ForgettingOptions):
    """GRU (Cho et al. 2014, arXiv 1406.1078) with block-diagonal recurrent weights, a block a head."""

    name: ClassVar[str] = "gru"


@dataclass(frozen=True)
class LSTMOptions(_ForgettingOptions):
    """LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000) with block-diagonal recurrent weights, a block a head."""

    name: ClassVar[str] = "lstm"


@dataclass(frozen=True)
class SLSTMOptions(_ForgettingOptions):
    """sLSTM (Beck et al. 2024, arXiv 2405.04517): an LSTM with a stabilised exponential input gate.

    The authors' code starts recurrent weights at zero, and forget biases by a power law over 12 units between −5 and 7
    whose exponent rises with depth, from 0.3 to 1.6, around the straight line that is taken here.
    """

    name: ClassVar[str] = "slstm"

    recurrent_init: float = 0.0
    forget_bias_min: float = -5.0
    forget_bias_max: float = 7.0


MixerOptions = (
    AttentionOptions
    | Mamba2Options
    | GatedDeltaOptions
    | ParaGRUOptions
    | ParaLSTMOptions
    | SLSTMOptions
    | LSTMOptions
    | GRUOptions
    | ElmanOptions
    | PrefixLinearAttentionOptions
    | MemoryOptions
)

OPTIONS: dict[str, type] = {
    "attention": AttentionOptions,
    "mamba2": Mamba2Options,
    "gated_delta": GatedDeltaOptions,
    "para_gru": ParaGRUOptions,
    "para_lstm": ParaLSTMOptions,
    "slstm": SLSTMOptions,
    "lstm": LSTMOptions,
    "gru": GRUOptions,
    "elman": ElmanOptions,
    "prefix_linear_attention": PrefixLinearAttentionOptions,
    **MEMORY_OPTIONS,
}
