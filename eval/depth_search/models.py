"""How a model of fixed depth runs a chain of its layers: Riverrun's, or any Hugging Face causal model whose layers are
a ModuleList.

What stands before the layers and after them is the model's own code, run with stand-ins in their place. Before: each
stand-in hands its hidden states on and notes what else its layer is given (masks by type of layer, rotary tables, a
layout). After: a single stand-in gives out the chain's hidden states. A layer gets what it gets in the model wherever
it is in a chain, and without a cache: every execution starts from a fresh state and attends to its own keys only.

When a model is taken up, its chain 0 … L−1 must give the model's own logits, bit by bit.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from riverrun.eval.depth_search.chains import Chain
from riverrun.eval.depth_search.units import Start, Units
from riverrun.eval.models import LoadedModel
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.stack import RiverrunModel

Call = Callable[[torch.Tensor, tuple, dict[str, Any]], Any]


class StandIn(nn.Module):
    """In a layer's place: has the layer's attributes, which the model may ask for."""

    def __init__(self, layer: nn.Module, call: Call):
        super().__init__()
        self.layer, self.call = layer, call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.call(hidden_states, args, kwargs)


class Layers(Units):
    """The layers of a model, to be run in any order.

    Raises:
        ValueError: a single layer; layers that are not a ModuleList run from first to last, each once, on hidden states
            (B, T, …); layers that hand one another more than hidden states.
    """

    def __init__(self, model: LoadedModel):
        self.name, self.network = model.description, model.model
        self._parent, self._attribute = _find(model)
        self.layers: nn.ModuleList = getattr(self._parent, self._attribute)
        self.identity = tuple(range(len(self.layers)))
        self._cuts_logits = "logits_to_keep" in inspect.signature(self.network.forward).parameters
        self._outputs: list[int | None] = []  # of each layer, how many if they are a tuple
        self._check(torch.arange(10, device=model.device).view(2, 5) % model.vocab_size)

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def start(self, ids: torch.Tensor) -> Start:
        """Its arguments are those of each layer besides hidden states, positional and named."""
        noted: list[tuple[torch.Tensor, tuple, dict[str, Any]]] = []

        def stand_in(i: int) -> StandIn:
            def call(hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
                noted.append((hidden, args, kwargs))
                return self._as_output(i, hidden)

            return StandIn(self.layers[i], call)

        self._logits(ids, [stand_in(i) for i in range(len(self))], 1)
        return Start(noted[0][0], [(args, kwargs) for _, args, kwargs in noted])

    @torch.no_grad()
    def apply(self, unit: int, hidden: torch.Tensor, start: Start) -> torch.Tensor:
        args, kwargs = start.arguments[unit]
        out = self.layers[unit](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        last = len(self) - 1
        stand_in = StandIn(self.layers[last], lambda *_: self._as_output(last, hidden))
        return self._logits(ids, [stand_in], keep)

    @torch.no_grad()
    def next_tokens(self, chain: Chain, prompt: list[int]) -> Iterator[int]:
        """Riverrun's models keep a state slot (or keys and values) for each place in the chain; others read everything
        again for each token."""
        device = next(self.network.parameters()).device
        ids = new = torch.tensor([prompt], device=device)
        cache = RiverrunCache(len(chain)) if isinstance(self.network, RiverrunForCausalLM) else None
        while True:
            if cache is None:
                logits = self.run(chain, ids, 1)
            else:
                with self._installed([self.layers[i] for i in chain]):
                    logits = self.network(new, past_key_values=cache, logits_to_keep=1).logits
            new = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], 1)
            yield int(new)

    @contextmanager
    def _installed(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Within, they are the model's layers."""
        setattr(self._parent, self._attribute, nn.ModuleList(modules))
        try:
            yield
        finally:
            setattr(self._parent, self._attribute, self.layers)

    def _logits(self, ids: torch.Tensor, modules: Sequence[nn.Module], keep: int) -> torch.Tensor:
        options = {"logits_to_keep": keep} if self._cuts_logits else {}
        with self._installed(modules):
            return self.network(ids, use_cache=False, **options).logits[:, -keep:]

    def _as_output(self, layer: int, hidden: torch.Tensor) -> Any:
        """Hidden states in the form that the model expects from its layer."""
        number = self._outputs[layer]
        return hidden if number is None else (hidden, *[None] * (number - 1))

    @torch.no_grad()
    def _check(self, ids: torch.Tensor) -> None:
        expected, noted = self.network(ids, use_cache=False).logits, []

        def stand_in(i: int) -> StandIn:
            def call(hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
                noted.append((i, hidden.shape, _copied((args, kwargs))))
                out = self.layers[i](hidden, *args, **kwargs)
                self._outputs.append(len(out) if isinstance(out, tuple) else None)
                return out

            return StandIn(self.layers[i], call)

        self._logits(ids, [stand_in(i) for i in range(len(self))], 0)
        if [i for i, *_ in noted] != list(range(len(self))) or any(shape[:2] != ids.shape for _, shape, _ in noted):
            raise ValueError(
                f"the layers of {self.name} do not run from first to last, each once and on hidden states of (rows, "
                "tokens, …): it has no chains"
            )
        # what they are given while no layer works depends on none of them
        if not _equal([given for *_, given in noted], self.start(ids).arguments):
            raise ValueError(f"the layers of {self.name} hand one another more than hidden states: it has no chains")
        if not torch.equal(self.run(self.identity, ids), expected):
            raise ValueError(f"the layers of {self.name}, run one by one, do not give its logits: it has no chains")


def _find(model: LoadedModel) -> tuple[nn.Module, str]:
    """The module that holds the ModuleList of layers, and its name there."""
    network = model.model
    if isinstance(network, RiverrunForCausalLM) and not isinstance(network.model, RiverrunModel):
        raise ValueError(
            f"{model.description} runs layers several times: chains are made of models of fixed depth, or of recurrent "
            "depth (model.depth)"
        )
    number = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: len(m) for name, m in network.named_modules() if isinstance(m, nn.ModuleList)}
    name = next((name for name, length in lists.items() if length == number), None)
    if name is None:
        raise ValueError(
            f"{model.description} has no ModuleList of its {number} layers, which chains are made of: choose a model "
            "of Hugging Face's usual decoder form"
        )
    if number == 1:
        raise ValueError(f"{model.description} has a single layer: chains need at least 2 to choose from")
    parent, _, attribute = name.rpartition(".")
    return network.get_submodule(parent), attribute


def _copied(value: Any) -> Any:
    """Containers and tensors as they are now."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(map(_equal, a, b))
    return not isinstance(b, torch.Tensor)
