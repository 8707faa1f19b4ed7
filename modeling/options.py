"""The shape of a model as plain dataclasses, shared by recipes (validated by pydantic) and saved configs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.depth.universal_options import UniversalOptions
from riverrun.modeling.memory_options import (
    AtlasOptions,
    DeepTransformerOptions,
    MemoraOptions,
    MonetaOptions,
    OmegaNetOptions,
    TitansLMMOptions,
    TitansMACOptions,
    TitansMAGOptions,
    TitansMALOptions,
    YaadOptions,
)
from riverrun.modeling.mixer_options import (
    OPTIONS,
    AttentionOptions,
    ElmanOptions,
    GatedDeltaOptions,
    GRUOptions,
    LSTMOptions,
    Mamba2Options,
    ParaGRUOptions,
    ParaLSTMOptions,
    PrefixLinearAttentionOptions,
    SLSTMOptions,
)

Initializer = Literal["normal", "takase"]


@dataclass(frozen=True)
class ModelOptions:
    """A decoder-only language model: `layer_pattern` repeated to `num_hidden_layers` blocks of mixer + SwiGLU.

    `intermediate_size` 0 leaves the SwiGLU out (a pure Mamba-2 stack); None derives 8/3 · hidden_size, rounded up to a
    multiple of 64.
    """

    __pydantic_config__ = {"extra": "forbid"}

    vocab_size: int = 32_000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    layer_pattern: tuple[str, ...] = ("mamba2",)
    intermediate_size: int | None = None
    tie_word_embeddings: bool = False
    norm_eps: float = 1e-5
    initializer: Initializer = "normal"  # of linear layers and embeddings; "takase" derives their deviation from h
    initializer_range: float = 0.02  # the standard deviation of "normal"
    scale_embedding: bool = False  # multiply embeddings by √hidden_size when they are looked up
    sandwich_norm: bool = False  # blocks also norm the residual stream after each sublayer (Huginn)
    post_norm_attention: bool = False  # attention blocks norm the sublayers' outputs, not inputs (OLMo 2 and Hybrid)
    depth: DepthOptions | None = None  # layers between a prelude and a coda run several times; None: all run once
    universal: UniversalOptions | None = None  # all layers are one block that runs again and again; None: they are not
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    mamba2: Mamba2Options = field(default_factory=Mamba2Options)
    gated_delta: GatedDeltaOptions = field(default_factory=GatedDeltaOptions)
    para_gru: ParaGRUOptions = field(default_factory=ParaGRUOptions)
    para_lstm: ParaLSTMOptions = field(default_factory=ParaLSTMOptions)
    slstm: SLSTMOptions = field(default_factory=SLSTMOptions)
    lstm: LSTMOptions = field(default_factory=LSTMOptions)
    gru: GRUOptions = field(default_factory=GRUOptions)
    elman: ElmanOptions = field(default_factory=ElmanOptions)
    prefix_linear_attention: PrefixLinearAttentionOptions = field(default_factory=PrefixLinearAttentionOptions)
    titans_lmm: TitansLMMOptions = field(default_factory=TitansLMMOptions)
    titans_mac: TitansMACOptions = field(default_factory=TitansMACOptions)
    titans_mag: TitansMAGOptions = field(default_factory=TitansMAGOptions)
    titans_mal: TitansMALOptions = field(default_factory=TitansMALOptions)
    moneta: MonetaOptions = field(default_factory=MonetaOptions)
    yaad: YaadOptions = field(default_factory=YaadOptions)
    memora: MemoraOptions = field(default_factory=MemoraOptions)
    omeganet: OmegaNetOptions = field(default_factory=OmegaNetOptions)
    atlas: AtlasOptions = field(default_factory=AtlasOptions)
    deep_transformer: DeepTransformerOptions = field(default_factory=DeepTransformerOptions)

    @property
    def layers(self) -> tuple[str, ...]:
        """The mixer of every layer, in order."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_hidden_layers))

    @property
    def effective_layers(self) -> int:
        """How many layers a token goes through, those that run several times counted as often as on average."""
        if self.universal is not None:
            return self.num_hidden_layers * self.universal.max_steps
        return self.num_hidden_layers if self.depth is None else self.depth.effective_layers(self.num_hidden_layers)

    @property
    def reads_prefix(self) -> bool:
        """Whether some layer can read a prefix without causality."""
        return "prefix_linear_attention" in self.layer_pattern and self.prefix_linear_attention.encoder

    def resolve(self) -> "ModelOptions":
        """A copy with every derived size written in."""
        ffn = self.intermediate_size
        if ffn is None:
            ffn = -(-8 * self.hidden_size // (3 * 64)) * 64
        mixers = {name: getattr(self, name).resolve(self.hidden_size) for name in OPTIONS}
        if self.universal is not None:
            mixers["attention"] = replace(mixers["attention"], rope=self.universal.positions == "rotary")
        return replace(self, intermediate_size=ffn, layer_pattern=tuple(self.layer_pattern), **mixers)

    def problems(self) -> list[str]:
        """Everything that is impossible about a resolved shape, each with its fix. Empty if the model can be built."""
        found = []
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "norm_eps", "initializer_range"):
            if getattr(self, name) <= 0:
                found.append(f"{name}={getattr(self, name)} must be positive")
        if self.initializer not in get_args(Initializer):
            found.append(f"initializer={self.initializer!r} is unknown; choose from {', '.join(get_args(Initializer))}")
        if self.sandwich_norm and self.post_norm_attention:
            found.append("sandwich_norm and post_norm_attention both norm what a sublayer leaves: set one of them")
        if self.depth is not None:
            found += self.depth.problems(self.num_hidden_layers)
        if self.universal is not None:
            found += self._universal_problems(self.universal)
        if self.intermediate_size is not None and self.intermediate_size < 0:
            found.append(f"intermediate_size={self.intermediate_size} must be positive, or 0 for no SwiGLU")
        if not self.layer_pattern:
            found.append(f"layer_pattern is empty; name at least one of {', '.join(OPTIONS)}")
        for name in sorted(set(self.layer_pattern) - set(OPTIONS)):
            found.append(f"layer_pattern names an unknown mixer {name!r}; choose from {', '.join(OPTIONS)}")
        if len(self.layer_pattern) > self.num_hidden_layers:
            found.append(
                f"layer_pattern has {len(self.layer_pattern)} entries but num_hidden_layers={self.num_hidden_layers}; "
                "add layers or shorten the pattern"
            )
        for name in dict.fromkeys(self.layer_pattern):
            if name in OPTIONS and self.hidden_size > 0:
                found += getattr(self, name).problems(self.hidden_size)
        return found

    def _universal_problems(self, universal: UniversalOptions) -> list[str]:
        found = universal.problems()
        if self.depth is not None:
            found.append("depth and universal are two ways to run layers several times: set one of them")
        if universal.norm == "post" and (self.sandwich_norm or self.post_norm_attention):
            found.append(
                "universal.norm='post' has norms of its own: set sandwich_norm and post_norm_attention to false, or "
                "universal.norm='pre'"
            )
        return found

    def tp_problems(self, tp: int) -> list[str]:
        """Everything about a resolved shape that `tp` tensor-parallel ranks cannot share, each with its fix."""
        found = []
        if self.vocab_size % tp:
            found.append(
                f"vocab_size={self.vocab_size} must be a multiple of parallel.tp={tp}: "
                f"set model.vocab_size={-(-self.vocab_size // tp) * tp}"
            )
        if self.intermediate_size and self.intermediate_size % tp:
            found.append(f"intermediate_size={self.intermediate_size} must be a multiple of parallel.tp={tp}")
        for name in dict.fromkeys(self.layer_pattern):
            found += getattr(self, name).tp_problems(self.hidden_size, tp)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; options of mixers that no layer uses are left out, and those of depth where it is fixed."""
        out = asdict(self)
        for name in ("depth", "universal"):
            if out[name] is None:
                del out[name]
        out["layer_pattern"] = list(self.layer_pattern)
        for name in set(OPTIONS) - set(self.layer_pattern):
            del out[name]
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelOptions":
        """The inverse of `to_dict`.

        Raises:
            ValueError: unknown keys.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown model options: {', '.join(unknown)}; known ones: {', '.join(sorted(known))}")
        values = dict(values)
        for name, options in {**OPTIONS, "depth": DepthOptions, "universal": UniversalOptions}.items():
            if isinstance(values.get(name), Mapping):
                values[name] = options(**values[name])
        if "layer_pattern" in values:
            values["layer_pattern"] = tuple(values["layer_pattern"])
        return cls(**values)


def shortest_pattern(layers: Sequence[str]) -> tuple[str, ...]:
    """The shortest `layer_pattern` that gives these layers when it is repeated."""
    length = next(n for n in range(1, len(layers) + 1) if all(m == layers[i % n] for i, m in enumerate(layers)))
    return tuple(layers[:length])
