"""Tensors of another checkpoint format as a table: which of theirs hold which of ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.parallel.sharding import meta_model


@dataclass(frozen=True)
class Entry:
    """Their tensors, concatenated along the first dimension, are ours, concatenated along the first dimension.

    Attributes:
        conv: theirs has a dimension of size 1 after the first (a depthwise `nn.Conv1d`), ours has not.
        join, split: where theirs (a single tensor) is made of ours in another way, and ours of theirs.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    conv: bool = False
    join: Callable[[list[torch.Tensor]], torch.Tensor] | None = None
    split: Callable[[torch.Tensor], list[torch.Tensor]] | None = None


Table = list[Entry]


def parameters_of(config: RiverrunConfig) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by name, tied ones once, on the meta device: shapes and dtypes without memory."""
    return dict(meta_model(config).named_parameters())


def identity(config: RiverrunConfig) -> Table:
    """The table of Riverrun's own format."""
    return [Entry((name,), (name,)) for name in parameters_of(config)]


def export_tensor(entry: Entry, ours: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Their tensor, from ours; an entry of several of theirs cannot be exported."""
    assert len(entry.theirs) == 1, f"no unique split of {entry.ours} into {entry.theirs}"
    parts = [ours[name] for name in entry.ours]
    if entry.join is not None:
        return entry.join(parts)
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor.unsqueeze(1) if entry.conv else tensor


def import_tensors(table: Table, theirs: Mapping[str, torch.Tensor], config: RiverrunConfig) -> dict[str, torch.Tensor]:
    """All of our tensors, from theirs, values and dtypes unchanged.

    Raises:
        ValueError: missing or unexpected tensors, or tensors of another shape; all of them are listed.
    """
    parameters = parameters_of(config)
    expected = {name for entry in table for name in entry.theirs}
    problems = [f"missing tensor {name}" for name in sorted(expected - set(theirs))]
    problems += [f"unexpected tensor {name}" for name in sorted(set(theirs) - expected)]
    ours: dict[str, torch.Tensor] = {}
    for entry in table:
        if not set(entry.theirs) <= set(theirs):
            continue
        sizes = [parameters[name].shape[0] for name in entry.ours]
        rest = parameters[entry.ours[0]].shape[1:]
        wanted = (sum(sizes), *((1,) if entry.conv else ()), *rest)
        if entry.join is not None:
            wanted = tuple(entry.join([parameters[name] for name in entry.ours]).shape)
        parts = [theirs[name] for name in entry.theirs]
        tensor = parts[0] if len(parts) == 1 or any(p.dim() == 0 for p in parts) else torch.cat(parts)
        if tuple(tensor.shape) != wanted:
            names = " + ".join(entry.theirs)
            problems.append(f"tensor {names} has shape {tuple(tensor.shape)}, the config asks for {wanted}")
            continue
        if entry.split is not None:
            ours.update(zip(entry.ours, entry.split(tensor)))
            continue
        tensor = tensor.squeeze(1) if entry.conv else tensor
        ours.update(zip(entry.ours, tensor.split(sizes) if len(sizes) > 1 else [tensor]))
    if problems:
        raise ValueError("these weights do not fit their config:\n" + "\n".join(f"  - {p}" for p in _short(problems)))
    return ours


def check_weights(weights: Mapping[str, torch.Tensor], config: RiverrunConfig) -> None:
    """Raise a ValueError that lists every missing, unexpected or misshapen tensor of our own names."""
    parameters = parameters_of(config)
    names = set(weights)
    tied = config.options.tie_word_embeddings and "lm_head.weight" in names
    if tied:  # a second name of the embedding
        names.discard("lm_head.weight")
    problems = [f"missing tensor {name}" for name in parameters if name not in names]
    problems += [f"unexpected tensor {name}" for name in sorted(names - set(parameters))]
    for name in parameters:
        if name in names and weights[name].shape != parameters[name].shape:
            shapes = f"{tuple(weights[name].shape)}, the config asks for {tuple(parameters[name].shape)}"
            problems.append(f"tensor {name} has shape {shapes}")
    if tied and not problems and not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        problems.append("lm_head.weight differs from the embedding, but tie_word_embeddings is true")
    if problems:
        raise ValueError("these weights do not fit the config:\n" + "\n".join(f"  - {p}" for p in _short(problems)))


def _short(problems: list[str], limit: int = 20) -> list[str]:
    more = len(problems) - limit
    return problems if more <= 0 else [*problems[:limit], f"and {more} more"]
