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
    found = {
        **software(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.machine(),
        "ranks": f"{ranks.world_size} ({ranks.mesh.describe()})",
    }
    (run_dir / "versions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def software() -> dict[str, str | None]:
    """The versions of what computes."""
    import transformers

    return {
        "riverrun": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        **engines.versions(),
    }


def check_same_software(ranks: Ranks) -> None:
    """
    Raises:
        ValueError: hosts of one run have different versions installed; says which ranks have which.
    """
    of_rank: dict[str, dict[str | None, list[int]]] = {}
    for rank, versions in enumerate(ranks.gather(software())):
        for name, version in versions.items():
            of_rank.setdefault(name, {}).setdefault(version, []).append(rank)
    mixed = [
        f"  - {name}: " + ", ".join(f"{version} on {_ranks(where)}" for version, where in versions.items())
        for name, versions in of_rank.items()
        if len(versions) > 1
    ]
    if mixed:
        listing = "\n".join(mixed)
        raise ValueError(f"the ranks of this run have different versions:\n{listing}\ninstall the same on every host")


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
