"""What recurrent layers start a row from in training: zeros, or states that other rows ended in.

A model that always starts from zeros never sees the states that a long text leads to, and fails in them (Buitrago & Gu
2025, arXiv 2507.02782; Chen et al. 2024, arXiv 2410.07145). `train.state_passing.mode`:

    off      Zeros.
    passing  The final state of the row in the same place of the batch a step before: an unrelated one, since rows
             come in random order.
    tbtt     Truncated backpropagation through time: the same, with rows in an order in which each goes on with the
             text of that row (see `riverrun.train.data.streams`). Where a document or a segment of the text begins,
             zeros.

No gradient goes through the states. They are those of every recurrent layer, tails of convolutions among them, kept in
fp32; attention sees only the row it is in. A row may hold several documents: the state enters the first and is
taken from the last. With `probability` below 1, some rows start from zeros all the same. Evaluation does so always.

Each rank keeps the states of its rows, in checkpoints too. A run that resumes on the layout that it was saved on goes
on bit for bit, and on another number of ranks the states are dealt to the new ones.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from riverrun.modeling.layers import at_least_fp32
from riverrun.modeling.mixers import States
from riverrun.train.config import StatePassingConfig
from riverrun.train.data.packing import Row
from riverrun.train.data.streams import Streams

COIN = zlib.crc32(b"state passing")
FOLDER = "states"  # of a checkpoint


class Carries:
    """Which rows go on from a state, as a function of the seed and a sample's number.

    Args:
        streams: the order of "tbtt"; None: that of "passing".
    """

    def __init__(self, config: StatePassingConfig, seed: int, streams: Streams | None):
        self.probability, self.seed, self.streams = config.probability, seed, streams

    def __call__(self, row: Row, number: int) -> bool:
        if self.streams is not None and (row.begins or not self.streams.continues(number)):
            return False
        if self.probability == 1:
            return True
        return bool(np.random.default_rng([self.seed, COIN, number]).random() < self.probability)


class StateBuffer:
    """The states that this rank's rows of the last step ended in.

    Args:
        first: the place in the global batch of this rank's first row.
        rows: a step on this rank.
        layers: of the model.
    """

    def __init__(self, first: int, rows: int, layers: int, device: torch.device):
        self.first, self.rows, self.device = first, rows, device
        self.layers: list[States] = [{} for _ in range(layers)]

    def take(self, start: int, carries: torch.Tensor | None) -> list[States]:
        """What the rows from `start` on begin with, by layer: their states, and zeros for those that carry none.

        Args:
            carries: (B,) bool, one of each row; None: none does.
        """
        if carries is None or not bool(carries.any()):
            return [{} for _ in self.layers]
        keep = carries.to(self.device)
        stop = start + len(carries)
        return [{name: _masked(state[start:stop], keep) for name, state in layer.items()} for layer in self.layers]

    def put(self, start: int, states: list[States]) -> None:
        """Keeps what the rows from `start` on ended in. Of a row whose states are not finite, zeros are kept."""
        for kept, layer in zip(self.layers, states, strict=True):
            for name, state in layer.items():
                state = at_least_fp32(state)
                finite = state.flatten(1).isfinite().all(dim=1)
                if name not in kept:
                    kept[name] = state.new_zeros(self.rows, *state.shape[1:])
                kept[name][start : start + len(state)] = _masked(state, finite)

    def state(self) -> dict[str, Any]:
        """For a file RANK.pt of a checkpoint's folder `FOLDER`."""
        return {"first": self.first, "layers": self.layers}

    def restore(self, folder: Path) -> bool:
        """Takes this rank's rows from what all ranks of a run wrote into `folder`.

        Returns:
            Whether they are there; otherwise nothing is carried into the next step.
        """
        saved = [torch.load(file, map_location="cpu", weights_only=True) for file in sorted(folder.glob("*.pt"))]
        if not saved:
            return False
        saved.sort(key=lambda part: part["first"])
        mine = slice(self.first, self.first + self.rows)
        for layer, parts in zip(self.layers, zip(*(part["layers"] for part in saved)), strict=True):
            for name in parts[0]:
                layer[name] = torch.cat([part[name] for part in parts])[mine].to(self.device)
        return True


def _masked(state: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A copy with zeros in the rows that are not kept."""
    return torch.where(keep.view(-1, *[1] * (state.dim() - 1)), state, 0)
