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
MAX_JSON_BYTES = 2**26
MAX_NAME = 255  # bytes that file systems take


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


def check_index(folder: Path) -> None:
    """For readers that open whatever file an index names.

    Raises:
        ValueError: an index of the folder names a file outside of it, or one that is not there.
    """
    for name, ending in ((INDEX, ".safetensors"), ("pytorch_model.bin.index.json", ".bin")):
        if (folder / name).is_file():
            _indexed(folder, name, ending)


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return _indexed(folder, INDEX, ".safetensors")
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has its weights only as pickle ({', '.join(pickles[:3])}), which can run code when read; "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}: give the folder of a saved model")


def _indexed(folder: Path, index: str, ending: str) -> list[str]:
    """The files that an index names, each a file of the folder itself: an index of others' may name any file."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / index} has no table `weight_map` of files' names: copy the whole folder again")
    files = sorted(set(weight_map.values()))
    plain = {name for name in files if name.isprintable() and len(name.encode()) <= MAX_NAME}
    plain = {name for name in plain if Path(name).name == name and name.endswith(ending) and (folder / name).is_file()}
    if missing := [name for name in files if name not in plain]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index} names: copy the whole folder again")
    return files


def read_json(path: Path) -> dict:
    """A JSON object from a file; infinities as transformers writes them, {"__float__": "Infinity"}, become floats.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}: give the folder of a saved model")
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than {MAX_JSON_BYTES} bytes: give the folder of a saved model")
    try:
        value = json.loads(content.decode(), object_hook=_decode_float)
    except (ValueError, TypeError, RecursionError) as error:  # not only JSONDecodeError: a number of 5000 digits, say
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
