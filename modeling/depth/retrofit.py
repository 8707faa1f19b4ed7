"""A trained model of fixed depth made recurrent (McLeish et al. 2025, arXiv 2511.07384): some of its layers become the
prelude, some the core, some the coda, and those between them are dropped.

The adapter starts as [0 | I], so that the core sees the prelude's output e and nothing of its state: before any
training, the model computes the kept layers one after the other, whatever the number of iterations. Nothing is normed
between core and coda (`DepthOptions.norm_core`), as nothing was there: if all layers are kept, the logits are the
original's. That, and giving s_0 the spread of e, which `prelude_rms` measures, are choices of this module.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import shortest_pattern

ADAPTER = "model.core.injection.weight"
PLACES = {"prelude": "model.prelude", "core": "model.core.layers", "coda": "model.coda"}


@dataclass(frozen=True)
class Parts:
    """Which layers of a model become which part, by their numbers from 0; prelude and coda may be empty."""

    prelude: range
    core: range
    coda: range

    @classmethod
    def parse(cls, prelude: str, core: str, coda: str) -> "Parts":
        """From texts such as "10-17" or "4"; "" is no layers.

        Raises:
            ValueError: another text, or a core without layers.
        """
        parts = cls(_layers("prelude", prelude), _layers("core", core), _layers("coda", coda))
        if not parts.core:
            raise ValueError("the core has no layers: name those that are to run several times, such as 4-7")
        return parts

    @property
    def kept(self) -> list[int]:
        return [*self.prelude, *self.core, *self.coda]

    def dropped(self, num_layers: int) -> list[int]:
        return sorted(set(range(num_layers)) - set(self.kept))

    def check(self, num_layers: int) -> None:
        """Raise a ValueError that lists everything that a model of so many layers makes impossible."""
        named = [(name, part) for name in PLACES if (part := getattr(self, name))]
        problems = [
            f"the {name} {_text(part)} goes beyond the model's layers, 0 to {num_layers - 1}"
            for name, part in named
            if part.stop > num_layers
        ]
        for (name, part), (after, later) in pairwise(named):
            if shared := sorted(set(part) & set(later)):
                problems.append(f"the {name} {_text(part)} and the {after} {_text(later)} share layer {shared[0]}")
            elif part.start > later.start:
                problems.append(f"the {name} {_text(part)} comes after the {after} {_text(later)}")
        if problems:
            raise ValueError(
                "these layers cannot be prelude, core and coda, which follow one another:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
            )


def retrofit(
    config: RiverrunConfig, weights: Mapping[str, torch.Tensor], parts: Parts, depth: DepthOptions
) -> tuple[RiverrunConfig, Mapping[str, torch.Tensor]]:
    """The recurrent model's config and weights; each is read from `weights` when it is looked up.

    Args:
        depth: its counts and `state_std`; the numbers of layers, the injection and `norm_core` are set here.

    Raises:
        ValueError: a model that is recurrent in depth already, or layers that it does not have.
    """
    options = config.options
    if options.depth is not None or options.universal is not None:
        raise ValueError("this model runs layers several times already: give one of fixed depth")
    parts.check(options.num_hidden_layers)
    depth = replace(
        depth,
        prelude_layers=len(parts.prelude),
        coda_layers=len(parts.coda),
        injection="linear",
        norm_core=False,
    )
    made = replace(
        options,
        num_hidden_layers=len(parts.kept),
        layer_pattern=shortest_pattern([options.layers[i] for i in parts.kept]),
        depth=depth,
    )
    return RiverrunConfig.from_options(made), _Retrofitted(weights, parts, options.hidden_size)


def prelude_rms(model: RiverrunForCausalLM, documents: Iterable[torch.Tensor]) -> float:
    """The root mean square of e over the channels of a token: its median over the tokens of `documents`, (T,) each. Few
    tokens, such as the first, can have entries thousands of times larger than others'; a mean would be theirs."""
    found = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        e = kwargs["e"] if "e" in kwargs else args[0]
        found.append(e.detach().float().pow(2).mean(-1).sqrt().flatten())

    hook = model.model.core.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            for tokens in documents:
                model(tokens[None], num_steps=1, logits_to_keep=1)
    finally:
        hook.remove()
    return float(torch.cat(found).median())


class _Retrofitted(Mapping[str, torch.Tensor]):
    """The weights of a model by the names that they have in the recurrent one, and the adapter."""

    def __init__(self, weights: Mapping[str, torch.Tensor], parts: Parts, hidden_size: int):
        self._weights, self._hidden_size = weights, hidden_size
        new = {
            old: f"{place}.{i}"
            for part, place in PLACES.items()
            for i, old in enumerate(getattr(parts, part))
        }  # fmt: skip
        self._old = {}
        for name in weights:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer is None:
                self._old[name] = name
            elif (place := new.get(int(layer[1]))) is not None:
                self._old[f"{place}.{name[layer.end() :]}"] = name

    def __getitem__(self, name: str) -> torch.Tensor:
        if name != ADAPTER:
            return self._weights[self._old[name]]
        h, like = self._hidden_size, self._weights["model.embed_tokens.weight"]
        return torch.cat([torch.zeros(h, h, dtype=like.dtype), torch.eye(h, dtype=like.dtype)], dim=1)

    def __iter__(self) -> Iterator[str]:
        yield from self._old
        yield ADAPTER

    def __len__(self) -> int:
        return len(self._old) + 1


def _layers(name: str, text: str) -> range:
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise ValueError(f"the {name} {text!r} names no layers: give the first and the last, such as 4-7, or one")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"the {name} {text} ends before it begins: give the first layer first, {last}-{first}")
    return range(first, last + 1)


def _text(part: range) -> str:
    return f"{part.start}-{part.stop - 1}" if len(part) > 1 else str(part.start)
