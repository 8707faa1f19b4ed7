"""Model folders on disk: written whole or not at all, tensors as safetensors."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def refuse_existing(out: Path) -> None:
    """Raise a ValueError if `out` exists and is not an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already: choose another folder, or delete it first")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` when the block ends well, and vanishes when it fails.

    A process that is killed leaves `.OUT.partial` behind, never an `out`; the next attempt clears it away.

    Raises:
        ValueError: `out` exists and is not an empty folder.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        os.replace(partial, out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_tensors(
    folder: Path, specs: Mapping[str, torch.Tensor], make: Callable[[str], torch.Tensor], max_shard_size: int | str
) -> None:
    """Write the tensors named by `specs` (meta tensors: shape and dtype) one shard at a time.

    `make(name)` is called once for each; no more than one shard of its results is alive at a time.
    """
    split = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda t: t.numel() * t.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for filename, names in split.filename_to_tensors.items():
        shard = {name: make(name).contiguous() for name in names}
        for name, tensor in shard.items():
            assert tensor.shape == specs[name].shape and tensor.dtype == specs[name].dtype, name
        save_file(shard, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """The tensors of a model folder, each read from disk when it is looked up.

    Raises:
        ValueError: there are no safetensors files, or a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self._stack = ExitStack()
        self._files = {}
        for filename in _weight_files(folder):
            try:
                file = self._stack.enter_context(safe_open(folder / filename, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{folder / filename} cannot be read ({error}): copy or export it again") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def shape(self, name: str) -> torch.Size:
        """Of a tensor, without reading it."""
        return torch.Size(self._files[name].get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        files = sorted(set(index.get("weight_map", {}).values()))
        if missing := [name for name in files if Path(name).name != name or not (folder / name).is_file()]:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: copy the whole folder again")
        return files
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has its weights only as pickle ({', '.join(pickles[:3])}), which can run code when read; "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}: give the folder of a saved model")


def read_json(path: Path) -> dict:
    """A JSON object from a file; infinities as transformers writes them, {"__float__": "Infinity"}, become floats.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_decode_float)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: give the folder of a saved model") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def _decode_float(value: dict) -> dict | float:
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
