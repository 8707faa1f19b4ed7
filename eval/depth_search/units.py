"""What chains are made of: the units of a model, which can be run in any order."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from riverrun.eval.depth_search.chains import Chain


class Start(NamedTuple):
    """What the units are given for rows of tokens.

    Attributes:
        hidden: (B, T, …) before the first unit.
        arguments: what `apply` gives the units besides.
    """

    hidden: torch.Tensor
    arguments: Any


class Units(ABC):
    """Attributes:
    identity: the chain that is the model as it is.
    core: the unit that is an iteration of a recurrent core; None: there is none.
    """

    identity: Chain
    core: int | None = None

    @abstractmethod
    def start(self, ids: torch.Tensor) -> Start:
        """ids (B, T), padded on the right if at all."""

    @abstractmethod
    def apply(self, unit: int, hidden: torch.Tensor, start: Start) -> torch.Tensor:
        """Hidden states (B, T, …) after a unit; `hidden` is of as many rows and tokens as `start`."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Of hidden states after a chain: (B, T, V), or of the last `keep` tokens."""

    @abstractmethod
    def next_tokens(self, chain: Chain, prompt: list[int]) -> Iterator[int]:
        """The likeliest token after a prompt, and after that, without end."""

    def run(self, chain: Chain, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """The logits of a chain, from the tokens on."""
        start = self.start(ids)
        hidden = start.hidden
        for unit in chain:
            hidden = self.apply(unit, hidden, start)
        return self.logits(hidden, ids, keep)
