"""The options of neural memories: one dataclass for the rule that Titans, Miras and ATLAS share, one a model for its
defaults. Where a paper leaves a value open, the field's comment says whose it is.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

from riverrun.kernels.common.memory_rule import DEEP_HALF_LIFE, LINEAR_HALF_LIFE, Rule
from riverrun.modeling.option_problems import not_shared, positive


@dataclass(frozen=True)
class NeuralMemoryOptions:
    """A memory per head, taught and asked by every token (`riverrun.kernels.neural_memory`)."""

    __pydantic_config__ = {"extra": "forbid"}

    name: ClassVar[str]

    num_heads: int = 0  # hidden_size / head_dim
    head_dim: int = 128  # of keys and values
    depth: int = 2  # L_M, layers of the memory; 1: a linear one, which has no residual, norm or activation
    expand: int = 4  # inner width of the memory / head_dim (Titans' NeurIPS text)
    gated: bool = False  # (φ(x W₁) ∘ (x W₂)) W₃ (LaCT; Atlas++)
    activation: Literal["gelu", "silu"] = "gelu"
    residual: bool = True  # f(x) = x + …
    norm: bool = True  # LayerNorm of the memory's output, with a gain
    bias: Literal["l2", "dot", "lp", "huber"] = "l2"  # attentional bias: the inner loss
    p: float = 3.0  # of "lp"
    retention: Literal["none", "lq", "softmax"] = "none"
    q: float = 4.0  # of "lq"
    momentum: bool = True
    omega_window: int = 1  # c, tokens whose losses each step minds
    newton_schulz: int = 0  # iterations of the orthogonalised update
    feature_degree: int = 1  # keys and queries become their powers up to this one, by learnable factors from 1 / i!
    chunk_size: int = 16  # b, tokens whose gradients are taken at the same weights; 1: the online rule
    read: Literal["after", "before", "chunk"] = "after"
    gates: Literal["head", "layer", "channel"] = "head"  # one a head; one a layer too; one for each output, by low rank
    gate_rank: int = 32  # of "channel" (Miras: 32 or 64)
    # tokens after which half is forgotten, at first (sigmoid(0) would leave none of 36); 0: 256 if linear, 8192 if deep
    half_life: float = 0.0
    momentum_init: float = 0.9  # η at first
    # θ = sigmoid(…) × what is stable for keys of unit length: "equal" even if a chunk's are all equal,
    # 2 (1 − η) / (b κ), κ the memory's curvature; "random" if they are random, 2 (1 − η) / ((1 + √(b / head_dim))² κ);
    # "none": 1.
    step_cap: Literal["equal", "random", "none"] = "equal"
    num_persistent: int = 4  # learned tokens that are written before every sequence (the papers give no number)
    conv_kernel: int = 4
    output_gate: bool = True
    norm_eps: float = 1e-5
    # states that a backward pass finds, memory against time and nothing else: "root", those before every √n-th of n
    # chunks, none of a linear memory, the rest computed again; "all", if it is Triton's kernels that compute
    keep_states: Literal["root", "all"] = "root"

    @property
    def feature_dim(self) -> int:
        """Of what the memory sees of keys and queries."""
        return self.head_dim * self.feature_degree

    @property
    def layer_sizes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the memory's matrices."""
        K, V, F = self.feature_dim, self.head_dim, self.expand * self.head_dim
        if self.gated:
            return (K, F), (K, F), (F, V)
        widths = [K, *[F] * (self.depth - 1), V]
        return tuple(pairwise(widths))

    @property
    def is_linear(self) -> bool:
        return self.depth == 1 and not self.gated

    @property
    def first_half_life(self) -> float:
        return self.half_life or (LINEAR_HALF_LIFE if self.is_linear else DEEP_HALF_LIFE)

    @property
    def rule(self) -> Rule:
        return Rule(
            chunk_size=self.chunk_size, read=self.read, bias=self.bias, p=self.p, activation=self.activation,
            residual=self.residual and not self.is_linear, gated=self.gated, retention=self.retention, q=self.q,
            window=self.omega_window, newton_schulz=self.newton_schulz,
        )  # fmt: skip

    def resolve(self, hidden_size: int):
        return replace(self, num_heads=self.num_heads or max(1, hidden_size // max(1, self.head_dim)))

    def tp_problems(self, hidden_size: int, tp: int) -> list[str]:
        return not_shared(f"{self.name}.num_heads", self.num_heads, tp)

    def problems(self, hidden_size: int) -> list[str]:
        found = positive(
            self.name, self, "num_heads", "head_dim", "depth", "expand", "feature_degree", "gate_rank", "conv_kernel"
        )
        found += [f"{self.name}: {problem}" for problem in self.rule.problems()]
        if self.half_life < 0:
            found.append(f"{self.name}.half_life={self.half_life} must be positive; 0 is what suits the memory's depth")
        if self.num_persistent < 0:
            found.append(f"{self.name}.num_persistent={self.num_persistent} must not be negative; 0 is none")
        if not 0 < self.momentum_init < 1:
            found.append(f"{self.name}.momentum_init={self.momentum_init} must lie between 0 and 1; 0.9 is usual")
        if self.newton_schulz and (not self.momentum or self.gates == "channel"):
            found.append(
                f"{self.name}.newton_schulz orthogonalises the momentum of whole matrices: set "
                f"{self.name}.momentum=true and {self.name}.gates='head' or 'layer'"
            )
        if self.rule.residual and self.feature_degree > 1:
            found.append(
                f"{self.name}.residual adds what the memory sees to what it says, which feature_degree="
                f"{self.feature_degree} makes wider than head_dim: set {self.name}.residual=false"
            )
        return found


@dataclass(frozen=True)
class TitansLMMOptions(NeuralMemoryOptions):
    """Titans' memory as a layer (LMM; arXiv 2501.00663, §3; chunks of 16 and the memory's form: its NeurIPS text)."""

    name: ClassVar[str] = "titans_lmm"


@dataclass(frozen=True)
class _TitansBlockOptions(NeuralMemoryOptions):
    """A memory and attention, of equal heads."""

    rope: bool = True
    rope_theta: float = 10_000.0
    output_gate: bool = False  # of MAG and MAC the memory is the gate

    def problems(self, hidden_size: int) -> list[str]:
        found = super().problems(hidden_size)
        if self.head_dim % 2:
            found.append(f"{self.name}.head_dim={self.head_dim} must be even (rotary positions turn pairs of channels)")
        return found


@dataclass(frozen=True)
class TitansMAGOptions(_TitansBlockOptions):
    """Titans' memory as a gate (MAG, §4.2): attention in a sliding window times what the memory says."""

    name: ClassVar[str] = "titans_mag"

    attention_window: int = 1024  # tokens that attention sees besides persistent ones (no number in the paper)

    def problems(self, hidden_size: int) -> list[str]:
        return super().problems(hidden_size) + positive(self.name, self, "attention_window")


@dataclass(frozen=True)
class TitansMALOptions(TitansMAGOptions):
    """Titans' memory as a layer before attention in a sliding window (MAL, §4.3)."""

    name: ClassVar[str] = "titans_mal"

    output_gate: bool = True


@dataclass(frozen=True)
class TitansMACOptions(_TitansBlockOptions):
    """Titans' memory as a context (MAC, §4.1): attention within segments, over what the memory says of them too."""

    name: ClassVar[str] = "titans_mac"

    segment: int = 256  # C, tokens of a segment, whole chunks (no number in the paper)

    def problems(self, hidden_size: int) -> list[str]:
        found = super().problems(hidden_size) + positive(self.name, self, "segment")
        if self.chunk_size > 0 and self.segment % self.chunk_size:
            found.append(
                f"{self.name}.segment={self.segment} must be a multiple of {self.name}.chunk_size={self.chunk_size}"
            )
        return found


@dataclass(frozen=True)
class _MirasOptions(NeuralMemoryOptions):
    """Miras' models (arXiv 2504.13173, §5.3 and §6): no momentum, gates of every channel by maps of low rank."""

    momentum: bool = False
    gates: Literal["head", "layer", "channel"] = "channel"
    num_persistent: int = 0


@dataclass(frozen=True)
class MonetaOptions(_MirasOptions):
    """Moneta: an ℓ_p loss and ℓ_q retention, (p, q) = (3, 4)."""

    name: ClassVar[str] = "moneta"

    bias: Literal["l2", "dot", "lp", "huber"] = "lp"
    retention: Literal["none", "lq", "softmax"] = "lq"


@dataclass(frozen=True)
class YaadOptions(_MirasOptions):
    """Yaad: a Huber loss whose threshold depends on the token (by coordinates: see `Rule`)."""

    name: ClassVar[str] = "yaad"

    bias: Literal["l2", "dot", "lp", "huber"] = "huber"


@dataclass(frozen=True)
class MemoraOptions(_MirasOptions):
    """Memora: weights that are probabilities, kept by the Kullback–Leibler divergence."""

    name: ClassVar[str] = "memora"

    retention: Literal["none", "lq", "softmax"] = "softmax"
    read: Literal["after", "before", "chunk"] = "chunk"


@dataclass(frozen=True)
class OmegaNetOptions(NeuralMemoryOptions):
    """OmegaNet (arXiv 2505.23735, §4): the Omega rule, on powers of keys and queries, without momentum.

    The window and the degree are not given there.
    """

    name: ClassVar[str] = "omeganet"

    residual: bool = False
    momentum: bool = False
    omega_window: int = 16
    feature_degree: int = 2
    num_persistent: int = 0


@dataclass(frozen=True)
class AtlasOptions(OmegaNetOptions):
    """Atlas (arXiv 2505.23735, §5): OmegaNet with momentum and Muon's update, here once a chunk instead of a token."""

    name: ClassVar[str] = "atlas"

    momentum: bool = True
    newton_schulz: int = 5
    chunk_size: int = 64
    read: Literal["after", "before", "chunk"] = "chunk"


@dataclass(frozen=True)
class DeepTransformerOptions(OmegaNetOptions):
    """DeepTransformers (arXiv 2505.23735, §3.2): a deep memory that takes dot products, on the first powers of the
    exponential's feature map, which has infinitely many."""

    name: ClassVar[str] = "deep_transformer"

    bias: Literal["l2", "dot", "lp", "huber"] = "dot"
    omega_window: int = 1


MemoryOptions = (
    TitansLMMOptions
    | TitansMAGOptions
    | TitansMALOptions
    | TitansMACOptions
    | MonetaOptions
    | YaadOptions
    | MemoraOptions
    | OmegaNetOptions
    | AtlasOptions
    | DeepTransformerOptions
)
MEMORY_OPTIONS: dict[str, type[MemoryOptions]] = {
    options.name: options
    for options in (
        TitansLMMOptions, TitansMAGOptions, TitansMALOptions, TitansMACOptions, MonetaOptions, YaadOptions,
        MemoraOptions, OmegaNetOptions, AtlasOptions, DeepTransformerOptions,
    )
}  # fmt: skip
