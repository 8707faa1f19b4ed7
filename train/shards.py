"""A checkpoint's weights and optimiser state by parameter, put together from the shards on disk when asked for.

DeepSpeed's files hold, for each tensor-parallel rank and each of the ranks with the same weights, equal pieces of flat
tensors. Whatever the layout that wrote them, here every parameter is one tensor: so runs resume on other layouts, and
exports read one parameter at a time. The files are mapped into memory, not read whole.

They are pickles, which could run code as they are read. So they are read by torch's restricted reader, which builds
tensors, plain values and what `STAND_INS` names, and refuses all else; DeepSpeed is not imported for it.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from riverrun.modeling.parallel.split import Split

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
MASTER = "fp32"  # the key of the full-precision weights, as in DeepSpeed's universal format


class _Plain:
    """Takes the attributes of an object of DeepSpeed's, and none of its code."""

    numel: int
    start: int


# the classes of objects in DeepSpeed's files of any stage, and what is built in their place
STAND_INS: dict[str, Any] = {
    "deepspeed.utils.tensor_fragment.fragment_address": _Plain,
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape": _Plain,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Plain,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}


@dataclass(frozen=True)
class _Piece:
    """Numbers [start, start + numel) of some flat tensors, by key, are the next ones of a parameter's shard."""

    flat: dict[str, torch.Tensor]
    start: int
    numel: int


class Shards(Mapping[str, torch.Tensor]):
    """The full-precision weights by parameter name, and with `read` the optimiser's state; of any ZeRO stage.

    Args:
        folder: DeepSpeed's folder of a checkpoint.
        plan: how tensor-parallel ranks share the parameters (`modeling.parallel.sharding.parameter_plan`); those that
            it does not name are whole on each.

    Raises:
        ValueError: the folder holds no such files.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Split | None]):
        self.plan = plan
        files = {place: file for file in folder.glob("*_optim_states.pt") if (place := _place(file)) is not None}
        if not files:
            raise ValueError(f"{folder} holds no optimiser states of DeepSpeed's")
        self.tp_size = 1 + max(tp for tp, _ in files)
        self._shapes: list[dict[str, torch.Size]] = []
        self._pieces: list[dict[str, list[_Piece]]] = []
        self._numbers: dict[str, dict[str, Any]] = {}
        with _understood(folder):
            for tp in range(self.tp_size):
                described = _load(_first(folder, f"mp_rank_{tp:02d}_model_states.pt"))
                groups = described["param_shapes"]
                self._shapes.append({name: shape for group in groups for name, shape in group.items()})
                pieces: dict[str, list[_Piece]] = {}
                for dp in range(sum(t == tp for t, _ in files)):
                    for name, piece, numbers in _pieces_of(_load(files[tp, dp])["optimizer_state_dict"], groups, dp):
                        pieces.setdefault(name, []).append(piece)
                        self._numbers[name] = numbers
                self._pieces.append(pieces)
            described = _load(_first(folder, "mp_rank_00_model_states.pt"))  # the others do not know of tied parameters
            self.aliases: dict[str, str] = described["shared_params"]
            self.counters: dict[str, int] = {key: described[key] for key in COUNTERS}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, MASTER)

    def __iter__(self) -> Iterator[str]:
        yield from self._shapes[0]
        yield from self.aliases

    def __len__(self) -> int:
        return len(self._shapes[0]) + len(self.aliases)

    def keys_of(self, name: str) -> list[str]:
        """What there is of a parameter: "fp32", and the optimiser's tensors, such as "exp_avg"."""
        return list(self._pieces[0][self.aliases.get(name, name)][0].flat)

    def numbers_of(self, name: str) -> dict[str, Any]:
        """The optimiser's numbers, such as "step"."""
        return self._numbers[self.aliases.get(name, name)]

    def read(self, name: str, key: str) -> torch.Tensor:
        """One whole tensor, on the CPU."""
        name = self.aliases.get(name, name)
        split = self.plan.get(name)
        ranks = range(self.tp_size if split is not None else 1)
        shards = [self._shard(tp, name, key) for tp in ranks]
        return shards[0] if len(shards) == 1 or split is None else split.join(shards)

    def _shard(self, tp: int, name: str, key: str) -> torch.Tensor:
        pieces = self._pieces[tp][name]
        parts = [piece.flat[key][piece.start : piece.start + piece.numel] for piece in pieces]
        return torch.cat(parts).view(self._shapes[tp][name])


class Universal(Mapping[str, torch.Tensor]):
    """The same of a checkpoint in DeepSpeed's universal format, a folder of files for each parameter."""

    def __init__(self, folder: Path):
        self.folder = folder / "zero"
        with _understood(folder):
            described = _load(_first(folder, "mp_rank_00_model_states.pt"))
            self.aliases: dict[str, str] = described["shared_params"]
            self.counters: dict[str, int] = {key: described[key] for key in COUNTERS}
        found = sorted(p.parent.name for p in self.folder.glob("*/fp32.pt"))
        self._names = [name for name in found if name not in self.aliases]
        if any(name not in found for name in self.aliases.values()):
            raise ValueError(
                f"{folder} does not hold what DeepSpeed writes (an alias of nothing): use another checkpoint"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, MASTER)

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self.aliases

    def __len__(self) -> int:
        return len(self._names) + len(self.aliases)

    def keys_of(self, name: str) -> list[str]:
        return [key for key in (MASTER, "exp_avg", "exp_avg_sq") if self._file(name, key).exists()]

    def numbers_of(self, name: str) -> dict[str, Any]:
        return {"step": _load(self._file(name, "step"))}

    def read(self, name: str, key: str) -> torch.Tensor:
        return _load(self._file(name, key))["param"]

    def _file(self, name: str, key: str) -> Path:
        return self.folder / self.aliases.get(name, name) / f"{key}.pt"


def _pieces_of(state: dict[str, Any], groups: list[dict[str, torch.Size]], rank: int):
    """(name, piece, numbers) of every parameter that a file holds part of."""
    if "fp32_flat_groups" in state:  # stage 3: a part of every parameter, of equal size on all ranks
        world = state["partition_count"]
        for i, (flat, shapes) in enumerate(zip(state["fp32_flat_groups"], groups)):
            tensors, numbers = _of_group(flat, state["optimizer_state_dict"]["state"].get(i, {}))
            start = 0
            for name, shape in shapes.items():
                part = -(-shape.numel() // world)
                yield name, _Piece(tensors, start, max(0, min(part, shape.numel() - rank * part))), numbers
                start += part
        return
    flats, states = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]["state"]
    for i, (flat, places) in enumerate(zip(flats, state["param_slice_mappings"])):
        tensors, numbers = _of_group(flat, states.get(i, {}))
        for name, place in places.items():
            yield name, _Piece(tensors, place.start, place.numel), numbers


def _of_group(flat: torch.Tensor, state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    def is_flat(value: Any) -> bool:
        return torch.is_tensor(value) and value.shape == flat.shape

    tensors = {MASTER: flat.detach()} | {key: value for key, value in state.items() if is_flat(value)}
    return tensors, {key: value for key, value in state.items() if not is_flat(value)}


def _place(file: Path) -> tuple[int, int] | None:
    """Which tensor-parallel rank, and which of the ranks with its weights, wrote a file; None: none of them."""
    match = re.search(r"zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states", file.name)
    return (int(match.group(2)), int(match.group(1))) if match else None


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """What else than DeepSpeed's tables stands in files that torch can read is the user's to mend, not a defect."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} does not hold what DeepSpeed writes ({type(error).__name__}: {error}): use another checkpoint"
        ) from error


def _first(folder: Path, name: str) -> Path:
    """A file that stage 3 writes once a rank, and other stages once."""
    alone, of_first = folder / name, folder / f"zero_pp_rank_0_{name}"
    return alone if alone.exists() else of_first


def check_files(folder: Path) -> None:
    """For readers that are not ours, and would run what a file tells them to.

    Raises:
        ValueError: a file below the folder holds other than tensors, plain values and DeepSpeed's own few classes.
    """
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin")):
        _load(file)


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Around torch's restricted reader: what it refuses is the user's to mend.

    Raises:
        ValueError: the file holds other objects than were allowed, or is none of torch's.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise ValueError(
            f"{file} holds objects{what} that a checkpoint does not have, and that could run code: it was not read. "
            "Use a checkpoint that Riverrun wrote"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is no file of torch's ({_first_line(error)}): use another checkpoint") from error


def _load(file: Path) -> Any:
    allowed: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    with reading(file), torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
