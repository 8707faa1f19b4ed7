"""What is measured on the held-out rows of a run: the same rows every time, and the same for any number of ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from riverrun.train import metrics
from riverrun.train.config import Recipe
from riverrun.train.data.packing import Batch
from riverrun.train.distributed import Ranks
from riverrun.train.engine import Engine
from riverrun.train.inputs import Inputs


def measure(
    engine: Engine, recipe: Recipe, inputs: Inputs, ranks: Ranks, alive: Callable[[], None]
) -> dict[str, Any] | None:
    """`loss` in nats, `perplexity` and `bits_per_byte`; of a recurrent-depth model after its mean number of iterations,
    and `loss_rR`, `perplexity_rR` after every number R of `train.recurrence.eval_steps`. None where there is no
    target. Called on every rank alike.

    Args:
        alive: is called before each batch.
    """
    assert inputs.held_out is not None
    batches = list(inputs.held_out.batches())
    if (loss := _loss(engine, batches, ranks, alive, None)) is None:
        return None
    bytes_per_token = inputs.held_out_bytes_per_token
    bits = metrics.bits_per_byte(loss, bytes_per_token) if bytes_per_token else None
    found = {"loss": loss, "perplexity": _perplexity(loss), "bits_per_byte": bits}
    depth = recipe.model.depth
    for r in recipe.train.recurrence.eval_steps:
        done = depth is not None and r == depth.mean_recurrence
        at_r = loss if done else _loss(engine, batches, ranks, alive, r)
        assert at_r is not None
        found |= {f"loss_r{r}": at_r, f"perplexity_r{r}": _perplexity(at_r)}
    return found


def _loss(
    engine: Engine, batches: Sequence[Batch], ranks: Ranks, alive: Callable[[], None], num_steps: int | None
) -> float | None:
    """Nats a target."""
    summed, targets = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    rounds = len(batches)
    if engine.stage == 3:  # every forward is a collective: no rank may stop before the others
        rounds = max(ranks.gather(rounds))
    for index in range(rounds):
        alive()
        value = engine.evaluate(batches[min(index, len(batches) - 1)], num_steps)
        if index < len(batches):
            summed += value
            targets += batches[index].num_targets if ranks.mesh.leads else 0
    total, count = ranks.total(summed.item(), targets)
    return total / count if count else None


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))
