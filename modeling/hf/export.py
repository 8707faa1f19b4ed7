"""Write a model as a Hugging Face folder: config, safetensors, tokenizer, and code if transformers has no class.

A model that a class of transformers computes exactly is written for that class; any other as `RiverrunForCausalLM`,
with the model's source beside the weights (see `remote_code`). Huginn's format, whose class is on the hub, is
written if it is asked for.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import torch
from transformers import GenerationConfig, PretrainedConfig

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.hf import huginn, mamba2, olmo_hybrid
from riverrun.modeling.hf.folder import new_folder, save_tensors
from riverrun.modeling.hf.remote_code import MODEL_CLASS, auto_map, write_remote_code
from riverrun.modeling.hf.tokenizer import SpecialTokens, copy_tokenizer
from riverrun.modeling.hf.weights import Entry, Table, check_weights, export_tensor, identity, parameters_of

Target = Literal["auto", "riverrun", "mamba2", "olmo_hybrid", "huginn"]
NATIVE: dict[str, ModuleType] = {"mamba2": mamba2, "olmo_hybrid": olmo_hybrid}
FORMATS = NATIVE | {"huginn": huginn}  # and one whose class transformers lacks: written only if asked for


def export_model(
    config: RiverrunConfig,
    weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_dir: Path | None = None,
    target: Target = "auto",
    max_shard_size: int | str = "5GB",
) -> str:
    """Write `out`, whole or not at all; needs memory for one shard besides `weights`.

    Args:
        weights: by the names of `RiverrunForCausalLM`'s parameters; those of a mapping are read one by one.
        dtype: of the written weights; None: as they are. The recurrences' A_log, dt_bias and D are always float32.
        tokenizer_dir: a folder in Hugging Face's layout whose tokenizer goes along; None: there is none.
        target: the class to write for; "auto": a native one if it computes the same, `RiverrunForCausalLM` otherwise.
        max_shard_size: bytes a file, or text such as "5GB".

    Returns:
        The name of the class that loads `out`.

    Raises:
        ValueError: `out` exists; `target` cannot compute the model (every reason is listed); weights or a tokenizer
            that do not fit the config.
    """
    chosen = resolve_target(config, target)
    ours = weights if isinstance(weights, Mapping) else dict(weights)
    check_weights(ours, config)
    with new_folder(out) as folder:
        tokens = SpecialTokens()
        if tokenizer_dir is not None:
            tokens = copy_tokenizer(Path(tokenizer_dir), folder, config.vocab_size)
        hf_config, table = describe(config, chosen)
        specs, make = _cast(config, ours, table, dtype)
        tokens.write_to(hf_config)
        hf_config.dtype = next(iter(specs.values())).dtype  # the embedding's
        hf_config.save_pretrained(folder)
        generation = GenerationConfig()
        tokens.write_to(generation)
        generation.save_pretrained(folder)
        if chosen == "riverrun":
            write_remote_code(folder)
        save_tensors(folder, specs, make, max_shard_size)
    assert hf_config.architectures
    return hf_config.architectures[0]


def resolve_target(config: RiverrunConfig, target: str = "auto") -> str:
    """The format to write: `target` itself, or the one that "auto" chooses.

    Raises:
        ValueError: an unknown target, or one that cannot compute the model; every reason is listed.
    """
    if target not in get_args(Target):
        raise ValueError(f"unknown export target {target!r}; choose one of {', '.join(get_args(Target))}")
    if target == "auto":
        return next((name for name, native in NATIVE.items() if not native.reasons_against(config)), "riverrun")
    if target in FORMATS and (reasons := FORMATS[target].reasons_against(config)):
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise ValueError(
            f"this model cannot be written as {FORMATS[target].ARCHITECTURE}; use target riverrun (or auto):\n{listed}"
        )
    return target


def describe(config: RiverrunConfig, target: str) -> tuple[PretrainedConfig, Table]:
    """The config of the class that `target` stands for, and where its tensors come from."""
    if target in FORMATS:
        other = FORMATS[target]
        hf_config, table = other.to_hf(config)
        hf_config.architectures = [other.ARCHITECTURE]
        return hf_config, table
    ours = RiverrunConfig(model=config.model)
    ours.architectures = [MODEL_CLASS]
    ours.auto_map = auto_map()
    return ours, identity(config)


def _cast(
    config: RiverrunConfig, ours: Mapping[str, torch.Tensor], table: Table, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], Callable[[str], torch.Tensor]]:
    """What will be written, as meta tensors, and the function that makes each."""
    fp32 = {name for name, p in parameters_of(config).items() if getattr(p, "keep_fp32", False)}
    entries = {entry.theirs[0]: entry for entry in table}

    def target_dtype(entry: Entry) -> torch.dtype:
        if not entry.ours or set(entry.ours) & fp32:  # a table that is computed, or a recurrence's parameter
            return torch.float32
        return dtype or ours[entry.ours[0]].dtype

    def spec(entry: Entry) -> torch.Tensor:
        metas = {name: torch.empty(ours[name].shape, device="meta") for name in entry.ours}
        return export_tensor(entry, metas).to(target_dtype(entry))

    def make(name: str) -> torch.Tensor:
        entry = entries[name]
        tensor = export_tensor(entry, ours).detach().cpu()
        return tensor.to(target_dtype(entry))

    return {name: spec(entry) for name, entry in entries.items()}, make
