"""Checkpoints that are whole or not there.

A checkpoint is a folder `RUN_DIR/checkpoints/step_XXXXXXXX` with
    zero/                DeepSpeed's files: weights, master weights and moments, a shard a rank
    rng/rank_XXXXX.pt    the states of the random number generators
    states/XXXXX.pt      the recurrent states that a rank passes to its next step, under `train.state_passing`
    trainer.json         everything else that a resumed run continues from
    manifest.json        size and SHA-256 of every file above
It is written under another name, synced to disk, and renamed once every rank is done. What a crash leaves half-written
is never looked at; a file that was damaged later does not fit the manifest.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.parallel.sharding import meta_model, parameter_plan
from riverrun.modeling.parallel.split import Split
from riverrun.train import engine as engines
from riverrun.train.config import Recipe
from riverrun.train.distributed import Ranks
from riverrun.train.shards import Shards, Universal
from riverrun.train.state_passing import FOLDER

PARTIAL, ASIDE = ".partial", ".superseded"
UNIVERSAL = "universal"  # the layout of a checkpoint that has none
_NAME = re.compile(r"step_(\d{8,})")


def folder_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps that a checkpoint comes after."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not a checkpoint: their names are like step_00001000")
    return int(match.group(1))


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first. Whether their files are intact, only `problem` tells."""
    folder = folder_of(run_dir)
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if all of them are as they were written."""
    manifest = checkpoint / "manifest.json"
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        for name, entry in entries.items():
            if _sha256(checkpoint / name) != entry["sha256"]:
                return f"{checkpoint / name} does not have the checksum it was written with"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({error})"
    return None


def latest(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are intact; `say` is told of every newer one that is not."""
    for checkpoint in reversed(checkpoints(run_dir)):
        wrong = problem(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"skipping checkpoint {checkpoint.name}: {wrong}")
    return None


def save(run_dir: Path, step: int, keep: int, engine: engines.Engine, state: dict[str, Any], ranks: Ranks) -> Path:
    """Writes a checkpoint on all ranks, then deletes all but the newest `keep`.

    Args:
        state: goes into trainer.json; rank 0's counts.

    Raises:
        OSError: some rank could not write, on all ranks alike. Earlier checkpoints are untouched.
    """
    final = folder_of(run_dir) / f"step_{step:08d}"
    partial = final.with_name(final.name + PARTIAL)

    def prepare() -> None:
        if ranks.rank == 0:
            _remove(partial)
            (partial / engines.TAG).mkdir(parents=True)
            (partial / "rng").mkdir()
            if engine.states is not None:
                (partial / FOLDER).mkdir()

    def write() -> None:
        engine.save(partial)
        torch.save(_rng_state(), partial / "rng" / f"rank_{ranks.rank:05d}.pt")
        if ranks.rank == 0:
            (partial / "trainer.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

    def describe() -> dict[str, dict[str, Any]]:
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        return {str(p.relative_to(partial)): _sync_and_describe(p) for p in files[ranks.rank :: ranks.world_size]}

    def finish() -> None:
        if ranks.rank == 0:
            files = {name: entry for part in parts for name, entry in sorted(part.items())}
            manifest = partial / "manifest.json"
            manifest.write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
            _sync(manifest)
            for folder in (*(p for p in partial.iterdir() if p.is_dir()), partial):
                _sync(folder)
            _remove(final)  # a damaged one of the same step
            partial.rename(final)
            _sync(final.parent)
            for old in checkpoints(run_dir)[:-keep]:
                _remove(old)

    try:
        for action in (prepare, write):
            _together(action, ranks)
        parts = _together(describe, ranks)
        _together(finish, ranks)
    except OSError:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def describe(folder: Path, state: dict[str, Any]) -> None:
    """Makes a folder with the files of an engine a checkpoint: adds trainer.json and the manifest."""
    (folder / "trainer.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = {str(p.relative_to(folder)): _sync_and_describe(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / "manifest.json").write_text(
        json.dumps({"step": state["step"], "files": files}, indent=1), encoding="utf-8"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`."""
    return json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))


def layout_of(recipe: Recipe, ranks: Ranks) -> dict[str, int]:
    """What decides which rank holds what of a checkpoint."""
    return {"zero_stage": recipe.engine.zero_stage, "dpcp": ranks.mesh.dpcp.size, "tp": ranks.mesh.tp.size}


def restore(checkpoint: Path, engine: engines.Engine, recipe: Recipe, ranks: Ranks) -> bool:
    """Weights, optimiser state and random number generators.

    Returns:
        Whether this layout is the one that wrote the checkpoint, so that all is restored bit by bit. On another one
        every rank's generators start anew, from the recipe's seed and the step.
    """
    state = read_state(checkpoint)
    if state["layout"] == layout_of(recipe, ranks):
        engine.load(checkpoint)
        _set_rng_state(torch.load(checkpoint / "rng" / f"rank_{ranks.rank:05d}.pt", weights_only=True))
        return True
    engine.adopt(open_weights(checkpoint), plan_of(recipe, ranks.mesh.tp.size))
    random.seed(f"{recipe.train.seed} {state['step']} {ranks.rank}")
    np.random.seed(random.getrandbits(32))  # noqa: NPY002 - libraries may draw from it
    torch.manual_seed(random.getrandbits(63))
    return False


def plan_of(recipe: Recipe, tp: int) -> dict[str, Split | None]:
    """How `tp` ranks share the parameters of a recipe's model."""
    return parameter_plan(meta_model(RiverrunConfig.from_options(recipe.model)), tp)


def open_weights(checkpoint: Path) -> Shards | Universal:
    """The whole weights of a checkpoint of any layout, and what else there is of each parameter."""
    state = read_state(checkpoint)
    if state["layout"] == UNIVERSAL:
        return Universal(checkpoint / engines.TAG)
    recipe = Recipe.model_validate_json(json.dumps(state["recipe"]))
    return Shards(checkpoint / engines.TAG, plan_of(recipe, state["layout"]["tp"]))


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Removes half-written checkpoints, and renames those beyond `step`: the run resumed there will write its own.

    Returns:
        The renamed checkpoints' new paths.
    """
    folder = folder_of(run_dir)
    for half in folder.glob(f"step_*{PARTIAL}"):
        _remove(half)
    moved = []
    for checkpoint in checkpoints(run_dir):
        if step_of(checkpoint) > step:
            target = checkpoint.with_name(checkpoint.name + ASIDE)
            _remove(target)
            moved.append(checkpoint.rename(target))
    return moved


def load_weights(run_dir: Path, step: int | None = None) -> Mapping[str, torch.Tensor]:
    """The full-precision (fp32) weights of a run by parameter name, without a process group. Each is read from disk
    when it is looked up, and put together from the shards of whatever layout wrote it.

    Args:
        step: of which checkpoint; None: the newest one that is intact.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    return open_weights(find(run_dir, step))


def find(run_dir: Path, step: int | None = None) -> Path:
    """The checkpoint of a step; None: the newest one that is intact.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    messages: list[str] = []
    if step is None:
        checkpoint = latest(run_dir, messages.append)
        if checkpoint is None:
            raise ValueError("\n".join([f"{run_dir} has no intact checkpoint", *messages]))
    else:
        checkpoint = folder_of(run_dir) / f"step_{step:08d}"
        if checkpoint not in checkpoints(run_dir):
            known = ", ".join(str(step_of(c)) for c in checkpoints(run_dir)) or "none"
            raise ValueError(f"{run_dir} has no checkpoint of step {step}; it has: {known}")
        wrong = problem(checkpoint)
        if wrong is not None:
            raise ValueError(f"checkpoint {checkpoint.name} is damaged: {wrong}")
    return checkpoint


def _together(action: Callable[[], Any], ranks: Ranks) -> list[Any]:
    """Runs an action on all ranks and waits for them; an OSError of one is raised on all."""
    result, error = None, None
    try:
        result = action()
    except OSError as raised:
        error = (raised.errno, str(raised))
    results = ranks.gather((result, error))
    for number, message in (failure for _, failure in results if failure is not None):
        raise OSError(number, message) if number is not None else OSError(message)
    return [value for value, _ in results]


def _rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries may draw from it
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync_and_describe(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file's data, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
