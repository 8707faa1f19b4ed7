"""What a run folder says of the run besides its weights."""

import json
import platform
from pathlib import Path

import numpy as np
import torch

from riverrun import __version__
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.train import engine as engines
from riverrun.train.config import Recipe
from riverrun.train.distributed import Ranks
from riverrun.train.inputs import Inputs
from riverrun.train.recipe import to_toml


def write_description(run_dir: Path, recipe: Recipe, model: RiverrunForCausalLM, inputs: Inputs, ranks: Ranks) -> None:
    """What an export or another reader needs besides the weights."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text(to_toml(recipe), encoding="utf-8")
    model.config.save_pretrained(run_dir)
    if inputs.tokenizer is not None:
        inputs.tokenizer.save(run_dir / "tokenizer")
    import transformers

    found = {
        "riverrun": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        **engines.versions(),
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.machine(),
        "ranks": f"{ranks.world_size} ({ranks.mesh.describe()})",
    }
    (run_dir / "versions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
