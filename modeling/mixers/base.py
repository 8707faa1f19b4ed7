"""The base class of token mixers, and their registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from riverrun.modeling.layout import Layout
from riverrun.modeling.parallel.mesh import ALONE, Axis
from riverrun.modeling.parallel.split import Plan

States = dict[str, torch.Tensor]


class Mixer(nn.Module, ABC):
    """A layer that mixes information over time: attention or a recurrence.

    Tensor parallelism gives every rank some of the heads or channels (see `parameter_plan`): `forward` then computes
    this rank's part of the sum that `o_proj` is, and takes counts of heads from its tensors, not from its options.

    A subclass is built from (options, hidden_size) and registered by name with `@register`. One `forward` serves
    training, prefill and single decoding steps: `states` carries whatever the layer needs from the tokens before. The
    projection back into the residual stream is a Linear named `o_proj` (its initialisation is scaled with depth).
    """

    tp: Axis = ALONE  # the ranks that share its heads or channels; its parameters are this rank's shards
    context_parallel = False  # `forward` heeds `layout.context`, where a row's tokens lie on several ranks
    fetched_whole = False  # ranks call its children unlike often: ZeRO-3 must not gather parameters at each call
    traceable = False  # torch.compile traces `forward`; other mixers run eagerly inside a compiled block

    @abstractmethod
    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        """x (B, T, hidden_size) → (B, T, hidden_size).

        `states` (None in training) holds the layer's states after the tokens before `x`, batch first; it is empty at
        the start and is updated in place. In a packed `layout` they are those before each row's first sequence, and
        afterwards those of its last.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise the parameters that this module holds itself (not those of its child layers)."""

    @abstractmethod
    def parameter_plan(self, tp: int = 1) -> Plan:
        """For each parameter, the dimension that `tp` tensor-parallel ranks split; None: each has the whole of it."""

    @abstractmethod
    def mixing_flops(self, seq_len: int) -> float:
        """FLOPs a token of the forward pass beyond the weight matrices (counted as 2 a parameter), in chunks of the
        default size, averaged over a sequence of `seq_len` tokens."""

    @abstractmethod
    def state_bytes(self, seq_len: int) -> int:
        """Bytes of decoding state a sequence after `seq_len` tokens, recurrent states in fp32, the rest in bf16."""


MIXERS: dict[str, type[Mixer]] = {}


def register(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a mixer known to `layer_pattern` under `name`."""

    def add(mixer: type[Mixer]) -> type[Mixer]:
        MIXERS[name] = mixer
        return mixer

    return add
