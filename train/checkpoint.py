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
from riverrun.train import manifest
from riverrun.train.config import Recipe
from riverrun.train.distributed import Ranks
from riverrun.train.shards import Shards, Universal, reading

PARTIAL, ASIDE, GONE = ".partial", ".superseded", ".removed"
GOOD = "last_good"  # holds the name of the last known good checkpoint
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
    """Finished checkpoints, oldest first. Whether their files are intact, only `manifest.problem` tells."""
    folder = folder_of(run_dir)
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def latest(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are intact; `say` is told of every newer one that is not."""
    for checkpoint in reversed(checkpoints(run_dir)):
        wrong = manifest.problem(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"skipping checkpoint {checkpoint.name}: {wrong}")
    return None


def publish(partial: Path, final: Path, step: int, files: Mapping[str, manifest.Entry]) -> None:
    """Writes the manifest of a folder whose files are all on disk, and gives it its name."""
    manifest.write(partial, step, files)
    for folder in (*(p for p in partial.iterdir() if p.is_dir()), partial):
        _sync(folder)
    remove(final)  # a damaged one of the same step
    partial.rename(final)
    _sync(final.parent)


def retire(run_dir: Path, keep: int) -> list[Path]:
    """Takes their names from all checkpoints but the newest `keep` and the last known good one.

    Returns:
        Their folders, which are to be deleted; `set_aside` deletes those that a crash left.
    """
    good = last_good(run_dir)
    return [_unname(old) for old in checkpoints(run_dir)[:-keep] if old != good]


def mark_good(run_dir: Path, step: int) -> None:
    """Notes that a finite evaluation came after the checkpoint of `step`."""
    pointer = folder_of(run_dir) / GOOD
    fresh = pointer.with_name(pointer.name + PARTIAL)
    fresh.write_text(f"step_{step:08d}\n", encoding="utf-8")
    _sync(fresh)
    os.replace(fresh, pointer)


def last_good(run_dir: Path) -> Path | None:
    """The newest checkpoint after which the held-out loss was finite; None: there is none, or nobody looked."""
    try:
        name = (folder_of(run_dir) / GOOD).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return next((c for c in checkpoints(run_dir) if c.name == name), None)


def to_return_to(run_dir: Path, before: int, say: Callable[[str], None]) -> Path | None:
    """The checkpoint from which to go on when steps after `before` went wrong: the last known good one, or, where no
    evaluation tells, the newest intact one up to there."""
    good = last_good(run_dir)
    if good is not None and step_of(good) <= before and manifest.problem(good) is None:
        return good
    for checkpoint in reversed([c for c in checkpoints(run_dir) if step_of(c) <= before]):
        if (wrong := manifest.problem(checkpoint)) is None:
            return checkpoint
        say(f"skipping checkpoint {checkpoint.name}: {wrong}")
    return None


def describe(folder: Path, state: dict[str, Any]) -> None:
    """Makes a folder with the files of an engine a checkpoint: adds trainer.json and the manifest."""
    (folder / "trainer.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    manifest.write(folder, state["step"], {p.relative_to(folder).as_posix(): sync_and_measure(p) for p in files})


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`.

    Raises:
        ValueError: trainer.json is not what was written: of a checkpoint that is intact, somebody else's.
    """
    path = checkpoint / "trainer.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        layout = state.get("layout", UNIVERSAL)
        ok = type(state["step"]) is int and state["step"] >= 0 and isinstance(state.get("recipe", {}), dict)
        ok = ok and (layout == UNIVERSAL or all(type(size) is int for size in layout.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        ok = False
    if not ok:
        raise ValueError(f"{path} is not what Riverrun writes: choose another checkpoint")
    return state


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
        file = checkpoint / "rng" / f"rank_{ranks.rank:05d}.pt"
        with reading(file):
            set_rng_state(torch.load(file, weights_only=True))
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
    for half in (*folder.glob(f"step_*{PARTIAL}"), *folder.glob(f"step_*{GONE}")):
        shutil.rmtree(half, ignore_errors=True)
    moved = []
    for checkpoint in checkpoints(run_dir):
        if step_of(checkpoint) > step:
            target = checkpoint.with_name(checkpoint.name + ASIDE)
            remove(target)
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
        wrong = manifest.problem(checkpoint)
        if wrong is not None:
            raise ValueError(f"checkpoint {checkpoint.name} is damaged: {wrong}")
    return checkpoint


def together(action: Callable[[], Any], ranks: Ranks) -> list[Any]:
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


def rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries may draw from it
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def sync_and_measure(path: Path) -> manifest.Entry:
    """A file's entry in the manifest, once its data is on disk."""
    _sync(path)
    return manifest.measure(path)


def _sync(path: Path) -> None:
    """Waits until a file's data, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A folder that is half removed when a crash comes does not have a checkpoint's name any more."""
    if path.exists():
        shutil.rmtree(_unname(path))


def _unname(path: Path) -> Path:
    gone = path.with_name(path.name + GONE)
    shutil.rmtree(gone, ignore_errors=True)
    return path.rename(gone)
