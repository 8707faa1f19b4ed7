"""The weights that a new run starts from under `train.init_from`: those of another run, a checkpoint or an export.

Weights only: the optimiser, the schedule and the data begin anew. The model has to be the same one, but for what does
not decide what its weights mean.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.hf.importer import import_model
from riverrun.modeling.hf.weights import check_weights
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.mesh import Axis
from riverrun.modeling.parallel.sharding import meta_model, parameter_plan
from riverrun.train import checkpoint, manifest
from riverrun.train.data.tokenizer import CONFIG, Tokenizer, load_tokenizer

MAY_DIFFER = {  # how weights are drawn, how recurrences are computed and how often, how far attention looks
    "initializer", "initializer_range", "A_init_min", "A_init_max", "dt_min", "dt_max", "dt_floor", "recurrent_init",
    "forget_bias_min", "forget_bias_max", "chunk_size", "tolerance", "window", "rope_theta",
    "mean_recurrence", "backprop_depth", "sampling", "sigma", "state_std",
}  # fmt: skip


def locate(init_from: str, option: str = "train.init_from") -> Path:
    """The checkpoint, or the folder in Hugging Face's layout, that `option` means; of a run, its newest intact
    checkpoint.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    folder = Path(init_from)
    if (folder / "trainer.json").is_file():
        if (wrong := manifest.problem(folder)) is not None:
            raise ValueError(f"{option}={init_from} is a damaged checkpoint: {wrong}")
        return folder
    if checkpoint.folder_of(folder).is_dir():
        return checkpoint.find(folder)
    if (folder / "config.json").is_file() and not (folder / "config.toml").is_file():
        return folder
    raise ValueError(
        f"{option}={init_from} has no weights: name a run folder with a checkpoint, a checkpoint, or an "
        "exported model's folder"
    )


def contents(found: Path) -> tuple[ModelOptions, Mapping[str, torch.Tensor]]:
    """The model that `locate` found, and its whole weights by parameter name."""
    if (found / "trainer.json").is_file():
        options = ModelOptions.from_dict(checkpoint.read_state(found)["recipe"]["model"])
        return options, checkpoint.open_weights(found)
    config, weights = import_model(found)
    return config.options, weights


def read(found: Path, options: ModelOptions) -> Mapping[str, torch.Tensor]:
    """The whole weights by parameter name, of what `locate` found.

    Raises:
        ValueError: it is another model than that of `options`; every difference is listed.
    """
    there, weights = contents(found)
    a, b = _leaves(there), _leaves(options)
    different = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    different = [key for key in different if key.rpartition(".")[2] not in MAY_DIFFER]
    if different:
        raise ValueError(
            f"train.init_from: {found} holds another model:\n"
            + "\n".join(f"  - model.{key}: {a.get(key)} there, {b.get(key)} here" for key in different)
            + "\ngive this run the same values"
        )
    check_weights(weights, RiverrunConfig.from_options(options))
    return weights


@torch.no_grad()
def adopt(model: RiverrunForCausalLM, weights: Mapping[str, torch.Tensor], tp: Axis) -> None:
    """Copies this rank's part of whole weights into its part of the model, a parameter at a time."""
    config = model.config
    assert isinstance(config, RiverrunConfig)
    plan = parameter_plan(meta_model(config), tp.size)
    for name, param in model.named_parameters():
        whole, split = weights[name], plan[name]
        param.copy_(whole if split is None or tp.size == 1 else split.take(whole, tp))


def tokenizer_of(init_from: str) -> Tokenizer | None:
    """The one that lies with the weights; None if none does."""
    folder = tokenizer_folder(init_from)
    return None if folder is None else load_tokenizer(folder)


def tokenizer_folder(init_from: str) -> Path | None:
    """Where that one lies."""
    folder = Path(init_from)
    places = (folder, folder / "tokenizer", folder.resolve().parent.parent / "tokenizer")
    return next((place for place in places if (place / CONFIG).is_file()), None)


def _leaves(options: ModelOptions) -> dict[str, Any]:
    """The options of a resolved model by dotted key, without those of mixers that it lacks."""
    found: dict[str, Any] = {}
    for key, value in options.resolve().to_dict().items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": part for name, part in value.items()}
        else:
            found[key] = value
    return found | {"layer_pattern": list(options.layers)}
