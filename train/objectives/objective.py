"""The objective of ordinary language modelling, and the base class of the others."""

from collections.abc import Sequence
from typing import Any

import torch

from riverrun.train.data.packing import Batch, Row, collate


class Objective:
    """Next-token prediction: the mean cross-entropy of all targets of a global batch.

    Another objective makes its own batches of the rows, and sums one or several losses over their predictions. What is
    minimised is Σ weight · (sum of the loss over the global batch) / (its count over the global batch). All methods are
    called on every rank alike, and what they draw at random depends on the recipe's seed and the numbers of step and
    rows alone, so that resuming and other numbers of ranks change nothing.

    Attributes:
        names: of the losses in the records; the first is the cross-entropy of the next token.
        weights: of each.
    """

    names: tuple[str, ...] = ("loss",)
    weights: tuple[float, ...] = (1.0,)

    def batch(self, rows: Sequence[Row], numbers: Sequence[int], step: int) -> Batch:
        """The micro batch of some rows of a training step; `numbers` are those of the rows in the whole order."""
        return collate(rows)

    def held_out_batch(self, rows: Sequence[Row]) -> Batch:
        """The micro batch of some rows of an evaluation, of which only the cross-entropy of the next token counts."""
        return collate(rows)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """How many predictions each of the losses sums over."""
        return (batch.num_targets,)

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments of the model's forward pass besides tokens, targets and bounds; `batch` is on the device."""
        return {}

    def losses(self, token_losses: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The summed losses, from the cross-entropy of every prediction in nats, (B, T), 0 where there is no target."""
        raise NotImplementedError  # where the sum over all targets is all there is, the model computes it at once

    @property
    def needs_token_losses(self) -> bool:
        return type(self).losses is not Objective.losses
