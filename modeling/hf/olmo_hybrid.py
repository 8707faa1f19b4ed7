"""transformers' `OlmoHybridForCausalLM`: Gated DeltaNet layers among attention layers with norms after the sublayers.

Files in this format differ in names from release to release; transformers maps them all when it loads. We write those
of the published checkpoints: one convolution each for q, k and v, and `attention_layer_norm`, `feedforward_layer_norm`
in Gated DeltaNet layers. Read are also the names of transformers' modules, and what its `save_pretrained` writes:
the convolutions of q, k and v in three equal parts, wherever the borders between q, k and v are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import OlmoHybridConfig

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.hf.reasons import reasons_in_stack
from riverrun.modeling.hf.weights import Entry, Table, import_tensors
from riverrun.modeling.mixer_options import AttentionOptions, GatedDeltaOptions
from riverrun.modeling.options import ModelOptions, shortest_pattern

ARCHITECTURE = "OlmoHybridForCausalLM"
OUTPUT_NORM_EPS = 1e-5  # fixed in the class, whatever its config says
LAYER_TYPES = {"linear_attention": "gated_delta", "full_attention": "attention"}


def reasons_against(config: RiverrunConfig) -> list[str]:
    """Why `OlmoHybridForCausalLM` cannot compute this model; empty if it can."""
    options = config.options
    reasons = reasons_in_stack(options)
    if others := sorted(set(options.layers) - set(LAYER_TYPES.values())):
        reasons.append(f"the class has gated_delta and attention layers, this model also has {', '.join(others)}")
    reasons += [
        f"the class needs at least one {mixer} layer" for mixer in LAYER_TYPES.values() if mixer not in options.layers
    ]
    if not options.intermediate_size:
        reasons.append("the class has a feed-forward layer in every block, this model has none (intermediate_size=0)")
    if options.initializer_range > 1:
        reasons.append(f"the class wants initializer_range ≤ 1, this model has {options.initializer_range}")
    if "attention" in options.layers:
        reasons += _reasons_in_attention(options)
    if "gated_delta" in options.layers:
        reasons += _reasons_in_delta(options.gated_delta)
    return reasons


def _reasons_in_attention(options: ModelOptions) -> list[str]:
    attention = options.attention
    reasons = []
    if not options.post_norm_attention:
        reasons.append("the class norms the outputs of attention blocks: it needs post_norm_attention=true")
    if attention.qk_norm != "full":
        reasons.append(
            f'the class norms q and k over all heads: it needs attention.qk_norm="full", not "{attention.qk_norm}"'
        )
    if attention.qk_bias:
        reasons.append("the class has no biases of q and k: it needs attention.qk_bias=false")
    if attention.window is not None:
        reasons.append(f"the class has no sliding window, this model has attention.window={attention.window}")
    return reasons


def _reasons_in_delta(delta: GatedDeltaOptions) -> list[str]:
    reasons = []
    if delta.num_householder != 1:
        reasons.append(f"the class has one Householder step, not gated_delta.num_householder={delta.num_householder}")
    if not delta.use_gate:
        reasons.append("the class has the decay gate: it needs gated_delta.use_gate=true")
    if not delta.output_gate:
        reasons.append("the class has the output gate: it needs gated_delta.output_gate=true")
    if delta.norm_eps != OUTPUT_NORM_EPS:
        reasons.append(f"the class fixes gated_delta.norm_eps at {OUTPUT_NORM_EPS}, this model has {delta.norm_eps}")
    return reasons


def to_hf(config: RiverrunConfig) -> tuple[OlmoHybridConfig, Table]:
    """Their config and where their tensors come from, for a model that there is no reason against."""
    options, attention, delta = config.options, config.options.attention, config.options.gated_delta
    types = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    assert options.intermediate_size, "see reasons_against"
    extra: dict[str, Any] = {}
    if attention.head_dim * attention.num_heads != options.hidden_size:
        extra["head_dim"] = attention.head_dim  # the class derives it otherwise
    theirs = OlmoHybridConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_hidden_layers,
        layer_types=[types[mixer] for mixer in options.layers],
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        hidden_act="silu",
        initializer_range=options.initializer_range,
        rms_norm_eps=options.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta if attention.rope else None},
        attention_bias=False,
        attention_dropout=0.0,
        linear_num_key_heads=delta.num_heads,
        linear_num_value_heads=delta.num_heads,
        linear_key_head_dim=delta.head_dim,
        linear_value_head_dim=delta.value_dim,
        linear_a_log_min=delta.A_init_min,  # the class, too, draws A and then takes the logarithm
        linear_a_log_max=delta.A_init_max,
        linear_dt_min=delta.dt_min,
        linear_dt_max=delta.dt_max,
        linear_dt_init_floor=delta.dt_floor,
        linear_conv_kernel_dim=delta.conv_kernel,
        linear_allow_neg_eigval=delta.allow_neg_eigval,
        tie_word_embeddings=options.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **extra,
    )
    return theirs, table(options)


def from_hf(values: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[RiverrunConfig, dict]:
    """Our config and weights, from their config.json and tensors.

    Raises:
        ValueError: a config that our model cannot compute, or tensors that do not fit it.
    """
    theirs: Any = OlmoHybridConfig.from_dict(values)
    rope = theirs.rope_parameters or {}
    has_rope = rope.get("rope_theta") is not None
    problems = [
        f"layer type {kind!r}: known are {', '.join(LAYER_TYPES)}"
        for kind in sorted(set(theirs.layer_types) - set(LAYER_TYPES))
    ]
    if theirs.attention_bias:
        problems.append("attention_bias=true: our projections have no bias")
    if theirs.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act={theirs.hidden_act!r}: ours is SiLU")
    if has_rope and rope.get("rope_type", "default") != "default":
        problems.append(f"rope_type={rope['rope_type']!r}: our rotary positions are not scaled")
    if has_rope and rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor: our rotary positions turn every channel")
    if theirs.linear_num_key_heads != theirs.linear_num_value_heads:
        problems.append(
            f"linear_num_key_heads={theirs.linear_num_key_heads} differs from "
            f"linear_num_value_heads={theirs.linear_num_value_heads}: our heads are not grouped"
        )
    if problems:
        raise ValueError(f"this {ARCHITECTURE} cannot be imported:\n" + "\n".join(f"  - {p}" for p in problems))
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    attention = AttentionOptions(
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads or theirs.num_attention_heads,
        head_dim=head_dim,
        rope=has_rope,
        rope_theta=rope["rope_theta"] if has_rope else AttentionOptions.rope_theta,
        qk_norm="full",
    )
    delta = GatedDeltaOptions(
        num_heads=theirs.linear_num_value_heads,
        head_dim=theirs.linear_key_head_dim,
        expand_v=theirs.linear_value_head_dim / theirs.linear_key_head_dim,
        allow_neg_eigval=theirs.linear_allow_neg_eigval,
        conv_kernel=theirs.linear_conv_kernel_dim,
        norm_eps=OUTPUT_NORM_EPS,
        A_init_min=theirs.linear_a_log_min or 1e-4,  # drawn from an open interval there: log 0 is not a start
        A_init_max=theirs.linear_a_log_max,
        dt_min=theirs.linear_dt_min,
        dt_max=theirs.linear_dt_max,
        dt_floor=theirs.linear_dt_init_floor,
    )
    options = ModelOptions(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers,
        layer_pattern=shortest_pattern([LAYER_TYPES[kind] for kind in theirs.layer_types]),
        intermediate_size=theirs.intermediate_size,
        tie_word_embeddings=theirs.tie_word_embeddings,
        norm_eps=theirs.rms_norm_eps,
        initializer_range=theirs.initializer_range,
        post_norm_attention=True,
        attention=attention,
        gated_delta=delta,
    )
    config = RiverrunConfig.from_options(options)
    return config, import_tensors(_as_found(table(config.options), tensors), tensors, config)


def table(options: ModelOptions) -> Table:
    """Their tensors, by the published names, and ours."""
    pairs = {"model.embed_tokens.weight": "model.embed_tokens.weight", "model.norm.weight": "model.norm.weight"}
    if not options.tie_word_embeddings:
        pairs["lm_head.weight"] = "lm_head.weight"
    convs = []
    for i, mixer in enumerate(options.layers):
        layer = f"model.layers.{i}"
        pairs |= {
            f"{layer}.mlp.{name}_proj.weight": f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
        }
        if mixer == "attention":
            pairs[f"{layer}.post_attention_layernorm.weight"] = f"{layer}.mixer_norm.weight"
            pairs[f"{layer}.post_feedforward_layernorm.weight"] = f"{layer}.mlp_norm.weight"
            names = [f"{name}_proj.weight" for name in "qkvo"] + ["q_norm.weight", "k_norm.weight"]
            pairs |= {f"{layer}.self_attn.{name}": f"{layer}.mixer.{name}" for name in names}
        else:
            pairs[f"{layer}.attention_layer_norm.weight"] = f"{layer}.mixer_norm.weight"
            pairs[f"{layer}.feedforward_layer_norm.weight"] = f"{layer}.mlp_norm.weight"
            names = [f"{name}_proj.weight" for name in "qkvabgo"] + ["A_log", "dt_bias"]
            pairs |= {f"{layer}.linear_attn.{name}": f"{layer}.mixer.{name}" for name in names}
            pairs[f"{layer}.linear_attn.o_norm.weight"] = f"{layer}.mixer.norm_weight"
            convs += [
                Entry((f"{layer}.linear_attn.{n}_conv1d.weight",), (f"{layer}.mixer.{n}_conv.weight",), conv=True)
                for n in "qkv"
            ]
    return [Entry((theirs,), (ours,)) for theirs, ours in pairs.items()] + convs


def _as_found(entries: Table, tensors: Mapping[str, torch.Tensor]) -> Table:
    """The table in the names that this checkpoint uses."""
    other_names = {
        "attention_layer_norm": "input_layernorm",
        "feedforward_layer_norm": "post_attention_layernorm",
        "post_attention_layernorm": "feedforward_layer_norm",
    }
    out = []
    for entry in entries:
        (name,) = entry.theirs
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind == "q_conv1d":
            together = f"{stem}.conv1d.weight"
            parts = tuple(f"{stem}.{n}_conv1d.weight" for n in "qkv")
            ours = tuple(entry.ours[0].replace(".q_conv.", f".{n}_conv.") for n in "qkv")
            out.append(Entry((together,) if together in tensors else parts, ours, conv=True))
        elif kind in other_names and name not in tensors and f"{stem}.{other_names[kind]}.weight" in tensors:
            out.append(Entry((f"{stem}.{other_names[kind]}.weight",), entry.ours))
        elif kind not in ("k_conv1d", "v_conv1d"):
            out.append(entry)
    return out
