"""Huginn-0125 (Geiping et al. 2025, arXiv 2502.05171): `RavenForCausalLM`, whose code is beside its weights on the hub.

Their rotary positions turn channels 2i and 2i + 1 of a head together, ours i and i + head_dim / 2: the rows of q and k,
and their biases, change places. Their `Wqkv` is our q, k, v projections, their `fc` our gate and up projections, their
`freqs_cis` a table of the rotary angles, which is checked when read and computed anew when written.

How fresh weights are drawn is not carried over: with them it is always "takase". Their first state's spread is √(2/5),
or 0 as `state_init` "zero"; the class on the hub does not read that field, and then has to be called with
`init_scale=0`. What their fields say beyond that (`KEPT`) stays with the config, for the way back.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, get_args

import torch
from transformers import PretrainedConfig

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions, Sampling
from riverrun.modeling.hf.weights import Entry, Table, import_tensors
from riverrun.modeling.layout import rotary_tables
from riverrun.modeling.mixer_options import AttentionOptions
from riverrun.modeling.options import ModelOptions

ARCHITECTURE = "RavenForCausalLM"
AUTO_MAP = {
    "AutoConfig": "raven_config_minimal.RavenConfig",
    "AutoModelForCausalLM": f"raven_modeling_minimal.{ARCHITECTURE}",
}
SIGMA = 0.5  # of the counts' log-normal distribution, a constant of their training code
PREFIX = "_orig_mod._original_module."  # of names in their training checkpoints
FIXED: dict[str, Any] = {  # what our model computes, and no other value
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "bias": False,
    "injection_type": "linear",
    "init_strategy": "takase",  # which also decides that embeddings are scaled by √n_embd
    "test_time_noise": 0,
}
KEPT: dict[str, Any] = {  # nothing that our model computes depends on these; with their class's defaults
    "block_size": 4096,  # tokens that the table of angles is for; ours are computed for any number
    "padding_multiple": 4096,
    "init_orthogonal": False,
    "activation_checkpoint_impl": "per-iteration",
    "test_time_noise_type": "fixed",
}
DEFAULTS: dict[str, Any] = {  # of their class, for fields that a config.json lacks
    "n_embd": 5280,
    "n_heads": 55,
    "vocab_size": 65536,
    "tie_embeddings": True,
    "intermediate_size": 17920,
    "norm_eps": 1e-6,
    "state_init": "like-init",
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "mean_recurrence": 32,
    "mean_backprop_depth": 8,
    "sampling_scheme": "poisson-lognormal-filling",
    "qk_bias": True,
    "rope_base": 50_000,
}
STATE_INIT = {"like-init": None, "zero": 0.0}  # and our `state_std`
ALIASES = {"num_attention_heads": "n_heads", "hidden_size": "n_embd", "num_hidden_layers": "n_layers"}
GENERAL = {  # fields that transformers or their training code writes, and that decide nothing here
    *PretrainedConfig().to_dict(), "auto_map", "torch_dtype", "tie_word_embeddings", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "name", "hf_config",
}  # fmt: skip


class HuginnConfig(PretrainedConfig):
    """Their fields, as config.json has them. `tie_word_embeddings` is not among them: their class gives it itself."""

    model_type = "huginn_raven"
    has_no_defaults_at_init = False

    def to_diff_dict(self) -> dict[str, Any]:
        values = super().to_diff_dict()
        return {"torch_dtype" if name == "dtype" else name: value for name, value in values.items()}


def reasons_against(config: RiverrunConfig) -> list[str]:
    """Why `RavenForCausalLM` cannot compute this model; empty if it can."""
    options, depth = config.options, config.options.depth
    if depth is None:
        return ["the class is recurrent in depth, this model is not (it has no model.depth)"]
    reasons = []
    if others := sorted(set(options.layers) - {"attention"}):
        reasons.append(f"the class has attention layers only, this model also has {', '.join(others)}")
    for name in ("sandwich_norm", "scale_embedding"):
        if not getattr(options, name):
            reasons.append(f"the class needs {name}=true")
    if not options.intermediate_size:
        reasons.append("the class has a feed-forward layer in every block, this model has none (intermediate_size=0)")
    return reasons + _reasons_in_depth(depth) + _reasons_in_attention(options.attention, options.hidden_size)


def _reasons_in_depth(depth: DepthOptions) -> list[str]:
    reasons = []
    if depth.injection != "linear":
        reasons.append(f'the class has depth.injection="linear", this model has "{depth.injection}"')
    if depth.state_std not in STATE_INIT.values():
        reasons.append(f"the class fixes depth.state_std at √(2/5), or 0, this model has {depth.state_std}")
    if depth.sampling == "poisson-lognormal-filling" and depth.sigma != SIGMA:
        reasons.append(f"the class fixes depth.sigma at {SIGMA}, this model has {depth.sigma}")
    if not depth.norm_core:
        reasons.append("the class norms what the core puts out: it needs depth.norm_core=true")
    return reasons


def _reasons_in_attention(attention: AttentionOptions, hidden_size: int) -> list[str]:
    reasons = []
    if attention.num_kv_heads != attention.num_heads:
        reasons.append(
            f"the class does not group queries: attention.num_kv_heads={attention.num_kv_heads} must be "
            f"attention.num_heads={attention.num_heads}"
        )
    if attention.num_heads * attention.head_dim != hidden_size:
        reasons.append("the class needs attention.num_heads × attention.head_dim = hidden_size")
    if attention.window is not None:
        reasons.append(f"the class has no sliding window, this model has attention.window={attention.window}")
    if not attention.rope:
        reasons.append("the class has rotary positions: it needs attention.rope=true")
    if attention.qk_norm != "none":
        reasons.append(f'the class does not norm q and k, this model has attention.qk_norm="{attention.qk_norm}"')
    return reasons


def to_hf(config: RiverrunConfig) -> tuple[HuginnConfig, Table]:
    """Their config and where their tensors come from, for a model that there is no reason against.

    `config.huginn`, if there is one, has values of `KEPT`, as it has in a config that was read from theirs.
    """
    options, attention, depth = config.options, config.options.attention, config.options.depth
    assert depth is not None, "see reasons_against"
    fields = FIXED | KEPT | getattr(config, "huginn", {}) | {
        "n_embd": options.hidden_size,
        "n_heads": attention.num_heads,
        "n_layers": options.num_hidden_layers,
        "vocab_size": options.vocab_size,
        "tie_embeddings": options.tie_word_embeddings,
        "intermediate_size": options.intermediate_size,
        "norm_eps": options.norm_eps,
        "state_init": next(name for name, std in STATE_INIT.items() if std == depth.state_std),
        "n_layers_in_prelude": depth.prelude_layers,
        "n_layers_in_recurrent_block": depth.core_layers(options.num_hidden_layers),
        "n_layers_in_coda": depth.coda_layers,
        "mean_recurrence": depth.mean_recurrence,
        "mean_backprop_depth": depth.backprop_depth,
        "sampling_scheme": depth.sampling,
        "qk_bias": attention.qk_bias,
        "rope_base": attention.rope_theta,
    }  # fmt: skip
    theirs = HuginnConfig(**fields, **_derived(fields))
    theirs.auto_map = AUTO_MAP
    angles = partial(_angles, fields["block_size"], attention.head_dim, attention.rope_theta)
    return theirs, [*table(options), Entry(("freqs_cis",), (), join=lambda parts: angles())]


def from_hf(values: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[RiverrunConfig, dict]:
    """Our config and weights, from their config.json and tensors.

    Raises:
        ValueError: a config that our model cannot compute, or tensors that do not fit it.
    """
    config = RiverrunConfig.from_options(options_of(values))
    config.huginn = {name: values[name] for name in KEPT if name in values}
    return config, import_tensors(table(config.options), _needed(tensors, config), config)


def options_of(values: dict[str, Any]) -> ModelOptions:
    """Our shape, from their config.json; fields that it lacks have their class's defaults.

    Raises:
        ValueError: a config that our model cannot compute; every problem is listed.
    """
    values = {ALIASES[name]: value for name, value in values.items() if name in ALIASES} | values
    fields = DEFAULTS | FIXED | values
    if problems := list(_problems(fields, values)):
        raise ValueError(f"this {ARCHITECTURE} cannot be imported:\n" + "\n".join(f"  - {p}" for p in problems))
    core, coda = fields["n_layers_in_recurrent_block"], fields["n_layers_in_coda"]
    depth = DepthOptions(
        prelude_layers=fields["n_layers_in_prelude"],
        coda_layers=coda,
        mean_recurrence=fields["mean_recurrence"],
        backprop_depth=fields["mean_backprop_depth"],
        sampling=fields["sampling_scheme"],
        sigma=SIGMA,
        injection="linear",
        state_std=STATE_INIT[fields["state_init"]],
    )
    attention = AttentionOptions(
        num_heads=fields["n_heads"],
        num_kv_heads=fields["n_heads"],
        head_dim=fields["n_embd"] // fields["n_heads"],
        rope_theta=float(fields["rope_base"]),
        qk_bias=fields["qk_bias"],
    )
    return ModelOptions(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["n_embd"],
        num_hidden_layers=depth.prelude_layers + core + coda,
        layer_pattern=("attention",),
        intermediate_size=fields["intermediate_size"],
        tie_word_embeddings=fields["tie_embeddings"],
        norm_eps=fields["norm_eps"],
        sandwich_norm=True,
        scale_embedding=True,
        initializer="takase",
        attention=attention,
        depth=depth,
    )


def table(options: ModelOptions) -> Table:
    """Their tensors, but for `freqs_cis`, and ours."""
    heads, depth = options.attention.num_heads, options.depth
    assert depth is not None
    out = [
        Entry(("transformer.wte.weight",), ("model.embed_tokens.weight",)),
        Entry(("transformer.ln_f.weight",), ("model.norm.weight",)),
        Entry(("transformer.adapter.weight",), ("model.core.injection.weight",)),
    ]
    if not options.tie_word_embeddings:
        out.append(Entry(("lm_head.weight",), ("lm_head.weight",)))
    parts = {
        ("prelude", "model.prelude"): depth.prelude_layers,
        ("core_block", "model.core.layers"): depth.core_layers(options.num_hidden_layers),
        ("coda", "model.coda"): depth.coda_layers,
    }
    for (theirs, ours), layers in parts.items():
        for i in range(layers):
            out += _block(f"transformer.{theirs}.{i}", f"{ours}.{i}", heads, options.attention.qk_bias)
    return out


def _block(theirs: str, ours: str, heads: int, qk_bias: bool) -> Table:
    norms = ("mixer_norm", "mixer_out_norm", "mlp_norm", "mlp_out_norm")
    out = [Entry((f"{theirs}.norm_{i}.weight",), (f"{ours}.{norm}.weight",)) for i, norm in enumerate(norms, start=1)]
    out.append(
        Entry(
            (f"{theirs}.attn.Wqkv.weight",),
            tuple(f"{ours}.mixer.{name}_proj.weight" for name in "qkv"),
            join=partial(_join_qkv, heads),
            split=partial(_split_qkv, heads),
        )
    )
    if qk_bias:
        out.append(
            Entry(
                (f"{theirs}.attn.qk_bias",),
                (f"{ours}.mixer.q_bias", f"{ours}.mixer.k_bias"),
                join=lambda parts: torch.stack([_beside(part, heads).view(1, heads, -1) for part in parts]),
                split=lambda bias: [_halves(part.flatten(), heads) for part in bias],
            )
        )
    out.append(Entry((f"{theirs}.attn.proj.weight",), (f"{ours}.mixer.o_proj.weight",)))
    out.append(Entry((f"{theirs}.mlp.fc.weight",), (f"{ours}.mlp.gate_proj.weight", f"{ours}.mlp.up_proj.weight")))
    out.append(Entry((f"{theirs}.mlp.proj.weight",), (f"{ours}.mlp.down_proj.weight",)))
    return out


def _join_qkv(heads: int, parts: list[torch.Tensor]) -> torch.Tensor:
    q, k, v = parts
    return torch.cat([_beside(q, heads), _beside(k, heads), v])


def _split_qkv(heads: int, weight: torch.Tensor) -> list[torch.Tensor]:
    q, k, v = weight.chunk(3)
    return [_halves(q, heads), _halves(k, heads), v]


def _halves(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads · head_dim, …) with the channels of a rotary pair side by side → half a head apart."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _beside(x: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_halves`."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _angles(block_size: int, head_dim: int, theta: float) -> torch.Tensor:
    """(1, block_size, 1, head_dim / 2, 2): cosine and sine of every position's angles, float32."""
    tables = rotary_tables(torch.arange(block_size)[None], head_dim, theta, torch.float32)
    cos, sin = (table[:, 0, :, None, : head_dim // 2] for table in tables)
    return torch.stack([cos, sin], dim=-1)


def _derived(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that their class computes from others."""
    std = math.sqrt(2 / (5 * fields["n_embd"]))
    around, core = fields["n_layers_in_prelude"] + fields["n_layers_in_coda"], fields["n_layers_in_recurrent_block"]
    depth = around + core * fields["mean_recurrence"]
    return {
        "padded_vocab_size": fields["vocab_size"],
        "num_key_value_heads": fields["n_heads"],
        "head_dim": fields["n_embd"] // fields["n_heads"],
        "effective_expected_depth": depth,
        "init_values": {
            "std": std,
            "out_proj": std / math.sqrt(2 * depth),
            "embedding": std,
            "embed_scale": math.sqrt(fields["n_embd"]),
        },
    }


def _problems(fields: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Everything in `values`, a config.json, that our model cannot compute; `fields` has defaults besides."""
    for name, value in FIXED.items():
        if fields[name] != value:
            yield f"{name}={fields[name]!r}: ours is {value!r}"
    if fields["state_init"] not in STATE_INIT:
        yield f"state_init={fields['state_init']!r}: ours is one of {', '.join(STATE_INIT)}"
    if fields["sampling_scheme"] not in get_args(Sampling):
        yield (
            f"sampling_scheme={fields['sampling_scheme']!r}: ours is one of {', '.join(get_args(Sampling))}; it only "
            "matters in training: set one of these in config.json"
        )
    if fields["n_embd"] % fields["n_heads"]:
        yield f"n_heads={fields['n_heads']} does not divide n_embd={fields['n_embd']}"
    layers = sum(fields[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda"))
    derived = _derived(fields) | {"n_layers": layers, "tie_word_embeddings": fields["tie_embeddings"]}
    derived |= {alias: {**fields, **derived}[name] for alias, name in ALIASES.items()}
    scales, wanted = values.get("init_values", {}), derived.pop("init_values")
    for name in ("std", "embed_scale"):  # the others are of fresh weights
        if not math.isclose(scales.get(name, wanted[name]), wanted[name], rel_tol=1e-6):
            yield f"init_values.{name}={scales[name]}: of n_embd={fields['n_embd']} it is {wanted[name]}"
    del derived["effective_expected_depth"]  # of fresh weights too
    for name, value in derived.items():
        if values.get(name, value) != value:
            yield f"{name}={values[name]!r}: by the other fields it is {value!r}"
    known = {*GENERAL, *FIXED, *KEPT, *DEFAULTS, *derived, "init_values", "effective_expected_depth"}
    if unknown := sorted(set(values) - known):
        yield (
            f"unknown fields {', '.join(unknown)}: delete them from config.json if they say nothing of what the model "
            "computes"
        )


def _needed(tensors: Mapping[str, torch.Tensor], config: RiverrunConfig) -> dict[str, torch.Tensor]:
    """Theirs, without what follows from others.

    Raises:
        ValueError: a second head or a table of angles that does not follow from the rest.
    """
    attention = config.options.attention
    found = {name.removeprefix(PREFIX): tensors[name] for name in tensors}
    angles = found.pop("freqs_cis", None)
    if angles is not None:
        ours = _angles(angles.shape[1] if angles.dim() == 5 else 0, attention.head_dim, attention.rope_theta)
        if angles.shape != ours.shape or not torch.allclose(angles.float(), ours, atol=0.01):  # may be rounded to bf16
            raise ValueError(
                f"freqs_cis holds other angles than rope_base={attention.rope_theta:g} gives: our rotary positions are "
                "not scaled"
            )
    head = found.pop("lm_head.weight", None) if config.options.tie_word_embeddings else None
    if head is not None and not torch.equal(head, found.get("transformer.wte.weight", head)):
        raise ValueError("lm_head.weight differs from transformer.wte.weight, but tie_embeddings is true")
    return found
