"""transformers' `Mamba2ForCausalLM`: a stack of nothing but Mamba-2 layers.

Their `in_proj` is our z, x, B, C, dt projections, in this order; their `conv1d` our x, B, C convolutions. Their
residual stream can be float32 under bf16 weights (`residual_in_fp32`); ours has the weights' dtype, and is exported so.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Mamba2Config
from transformers.models.mamba2 import modeling_mamba2

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.hf.reasons import reasons_in_stack
from riverrun.modeling.hf.weights import Entry, Table, import_tensors
from riverrun.modeling.mixer_options import Mamba2Options
from riverrun.modeling.options import ModelOptions

ARCHITECTURE = "Mamba2ForCausalLM"


def reasons_against(config: RiverrunConfig) -> list[str]:
    """Why `Mamba2ForCausalLM` cannot compute this model; empty if it can."""
    options = config.options
    reasons = reasons_in_stack(options)
    if others := sorted(set(options.layers) - {"mamba2"}):
        reasons.append(f"the class has Mamba-2 layers only, this model also has {', '.join(others)}")
    if options.intermediate_size:
        reasons.append(
            f"the class has no feed-forward layers, this model has (intermediate_size={options.intermediate_size})"
        )
    if "mamba2" not in options.layers:
        return reasons
    if options.mamba2.norm_eps != options.norm_eps:
        reasons.append(
            f"the class has one epsilon for all norms, this model has norm_eps={options.norm_eps} and "
            f"mamba2.norm_eps={options.mamba2.norm_eps}"
        )
    if options.mamba2.num_groups > 1 and not _has_grouped_norm():
        reasons.append(
            f"the class of the installed transformers normalises all of mamba2.num_groups={options.mamba2.num_groups} "
            "groups together: upgrade transformers"
        )
    return reasons


def to_hf(config: RiverrunConfig) -> tuple[Mamba2Config, Table]:
    """Their config and where their tensors come from, for a model that there is no reason against."""
    options, mixer = config.options, config.options.mamba2
    theirs = Mamba2Config(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_heads=mixer.expand * options.hidden_size // mixer.head_dim,
        head_dim=mixer.head_dim,
        state_size=mixer.state_size,
        n_groups=mixer.num_groups,
        expand=mixer.expand,
        conv_kernel=mixer.conv_kernel,
        use_conv_bias=mixer.conv_bias,
        use_bias=False,
        hidden_act="silu",
        layer_norm_epsilon=options.norm_eps,
        initializer_range=options.initializer_range,
        residual_in_fp32=False,
        time_step_min=mixer.dt_min,
        time_step_max=mixer.dt_max,
        time_step_floor=mixer.dt_floor,
        time_step_limit=(0.0, math.inf),
        chunk_size=mixer.chunk_size,
        tie_word_embeddings=options.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return theirs, table(options)


def from_hf(values: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[RiverrunConfig, dict]:
    """Our config and weights, from their config.json and tensors.

    Raises:
        ValueError: a config that our model cannot compute, or tensors that do not fit it.
    """
    theirs: Any = Mamba2Config.from_dict(values)
    problems = []
    if theirs.use_bias:
        problems.append("use_bias=true: our projections have no bias")
    if theirs.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act={theirs.hidden_act!r}: ours is SiLU")
    if tuple(theirs.time_step_limit) != (0.0, math.inf):
        problems.append(f"time_step_limit={tuple(theirs.time_step_limit)}: our step sizes have no limit")
    if theirs.expand != int(theirs.expand):
        problems.append(f"expand={theirs.expand}: ours is a whole number")
    if theirs.hidden_size * theirs.expand != theirs.num_heads * theirs.head_dim:
        problems.append("hidden_size × expand differs from num_heads × head_dim")
    if problems:
        raise ValueError(f"this {ARCHITECTURE} cannot be imported:\n" + "\n".join(f"  - {p}" for p in problems))
    mixer = Mamba2Options(
        expand=int(theirs.expand),
        head_dim=theirs.head_dim,
        state_size=theirs.state_size,
        num_groups=theirs.n_groups,
        conv_kernel=theirs.conv_kernel,
        conv_bias=theirs.use_conv_bias,
        norm_eps=theirs.layer_norm_epsilon,
        chunk_size=theirs.chunk_size,
        dt_min=theirs.time_step_min,
        dt_max=theirs.time_step_max,
        dt_floor=theirs.time_step_floor,
    )
    options = ModelOptions(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers,
        layer_pattern=("mamba2",),
        intermediate_size=0,
        tie_word_embeddings=theirs.tie_word_embeddings,
        norm_eps=theirs.layer_norm_epsilon,
        initializer_range=theirs.initializer_range,
        mamba2=mixer,
    )
    config = RiverrunConfig.from_options(options)
    return config, import_tensors(table(config.options), tensors, config)


def table(options: ModelOptions) -> Table:
    """Their tensors and ours."""
    out = [
        Entry(("backbone.embeddings.weight",), ("model.embed_tokens.weight",)),
        Entry(("backbone.norm_f.weight",), ("model.norm.weight",)),
    ]
    if not options.tie_word_embeddings:
        out.append(Entry(("lm_head.weight",), ("lm_head.weight",)))
    for i in range(options.num_hidden_layers):
        theirs, ours = f"backbone.layers.{i}", f"model.layers.{i}"
        out.append(Entry((f"{theirs}.norm.weight",), (f"{ours}.mixer_norm.weight",)))
        theirs, ours = f"{theirs}.mixer", f"{ours}.mixer"
        projections = tuple(f"{ours}.{name}_proj.weight" for name in ("z", "x", "B", "C", "dt"))
        out.append(Entry((f"{theirs}.in_proj.weight",), projections))
        convs = [f"{ours}.{name}_conv" for name in ("x", "B", "C")]
        out.append(Entry((f"{theirs}.conv1d.weight",), tuple(f"{conv}.weight" for conv in convs), conv=True))
        if options.mamba2.conv_bias:
            out.append(Entry((f"{theirs}.conv1d.bias",), tuple(f"{conv}.bias" for conv in convs)))
        out += [Entry((f"{theirs}.{name}",), (f"{ours}.{name}",)) for name in ("A_log", "D", "dt_bias")]
        out.append(Entry((f"{theirs}.norm.weight",), (f"{ours}.norm_weight",)))
        out.append(Entry((f"{theirs}.out_proj.weight",), (f"{ours}.o_proj.weight",)))
    return out


def _has_grouped_norm() -> bool:
    """Whether transformers' gated norm knows groups; older releases ignore n_groups there."""
    return "group_size" in inspect.signature(modeling_mamba2.MambaRMSNormGated).parameters
