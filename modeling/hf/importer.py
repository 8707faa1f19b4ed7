"""Read a Hugging Face folder as a Riverrun model. Reads JSON and safetensors only, and runs no code from the folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.hf import huginn, mamba2, olmo_hybrid
from riverrun.modeling.hf.folder import SafetensorsFolder, read_json
from riverrun.modeling.hf.remote_code import MODEL_CLASS
from riverrun.modeling.hf.weights import check_weights, identity, import_tensors
from riverrun.modeling.model import RiverrunForCausalLM

LARGEST = 2**31  # of a whole number in a config.json


def import_model(hf_dir: Path) -> tuple[RiverrunConfig, dict[str, torch.Tensor]]:
    """Config and weights by our parameters' names, in the dtypes of the files (tied weights once).

    Raises:
        ValueError: the folder holds no such model, one of another architecture, weights in pickle files only, or
            tensors that are missing, unexpected or of another shape.
    """
    hf_dir = Path(hf_dir)
    values = read_json(hf_dir / "config.json")
    architecture = architecture_of(values)
    readers = {
        MODEL_CLASS: _from_riverrun,
        mamba2.ARCHITECTURE: mamba2.from_hf,
        olmo_hybrid.ARCHITECTURE: olmo_hybrid.from_hf,
        huginn.ARCHITECTURE: huginn.from_hf,
    }
    if architecture not in readers:
        raise ValueError(
            f"{hf_dir} holds a model of architecture {architecture}, which cannot be imported; "
            f"supported are {', '.join(readers)}"
        )
    tensors: Mapping[str, torch.Tensor] = SafetensorsFolder(hf_dir)
    if values.get("tie_word_embeddings") and "lm_head.weight" in tensors:  # a second name of the embedding
        tensors = {name: tensors[name] for name in tensors if name != "lm_head.weight"}
    with _told(hf_dir):
        _check_sizes(values, len(tensors))
        return readers[architecture](values, tensors)


def architecture_of(values: Mapping[str, Any]) -> str | None:
    """The class that a config.json names first; None if it names none."""
    named = values.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else None


def _check_sizes(values: Mapping[str, Any], tensors: int) -> None:
    """Before anything is derived from them: building what a damaged config asks for could take for ever.

    Raises:
        ValueError: a size that no model has, or more layers than there are tensors.
    """
    ours = values.get("model")
    for table in (values, ours if isinstance(ours, dict) else {}):
        for name, value in table.items():
            layers = "layer" in name and isinstance(value, int) and value > tensors
            if layers or (isinstance(value, int) and abs(value) > LARGEST):
                least = f", more than the {tensors} tensors there are" if layers else ""
                raise ValueError(f"config.json has {name}={str(value)[:20]}{least}: copy the whole folder again")


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Whatever a config.json of wrong values leads to is the user's to mend, and names its folder."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:  # the latter: transformers found a wrong type
        raise ValueError(f"{folder}: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, StopIteration) as error:
        raise ValueError(
            f"{folder}: config.json has values that are no model's ({type(error).__name__}: {error}): copy the whole "
            "folder again"
        ) from error


def load_pretrained(hf_dir: Path, dtype: torch.dtype | None = None) -> RiverrunForCausalLM:
    """A model ready for evaluation and generation, from any folder that `import_model` reads.

    Args:
        dtype: of the weights; None: as in the files. The recurrences' A_log, dt_bias and D are always float32.

    Raises:
        ValueError: see `import_model`.
    """
    hf_dir = Path(hf_dir)
    config, weights = import_model(hf_dir)
    model = build_model(config, weights, dtype)
    if (hf_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(hf_dir, local_files_only=True)
    return model


def read_config(folder: Path) -> RiverrunConfig:
    """The config that `RiverrunConfig.save_pretrained` wrote into `folder`, such as a run's.

    Raises:
        ValueError: there is none, or it is not Riverrun's.
    """
    with _told(Path(folder)):
        return _config(read_json(Path(folder) / "config.json"))


def build_model(
    config: RiverrunConfig, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> RiverrunForCausalLM:
    """The model with these weights, in evaluation mode, without initialising or copying it first.

    Raises:
        ValueError: weights that do not fit the config.
    """
    check_weights(weights, config)
    with torch.device("meta"):
        model = RiverrunForCausalLM(config)
    for name, old in list(model.named_parameters()):
        keep_fp32 = getattr(old, "keep_fp32", False)
        new = torch.nn.Parameter(weights[name].to(torch.float32 if keep_fp32 else dtype or weights[name].dtype))
        new.__dict__.update(old.__dict__)  # keep_fp32, no_weight_decay
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, new)
    model.tie_weights()
    return model.eval()


def _from_riverrun(values: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[RiverrunConfig, dict]:
    config = _config(values)
    return config, import_tensors(identity(config), tensors, config)


def _config(values: dict[str, Any]) -> RiverrunConfig:
    if not isinstance(values.get("model"), dict):
        raise ValueError("config.json has no `model` section: it was not written by Riverrun")
    return RiverrunConfig(model=values["model"])
