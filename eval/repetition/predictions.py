"""A model's predictions of given tokens: the probability of each, and what would have been likeliest."""

from typing import NamedTuple

import numpy as np
import torch

from riverrun.eval.batches import pad
from riverrun.eval.models import LoadedModel
from riverrun.modeling.layout import Layout
from riverrun.modeling.model import RiverrunForCausalLM

LOGITS = 2**25  # that are there at a time


class Predictions(NamedTuple):
    """Of every token of a row but the first, (T − 1,).

    Attributes:
        log_p: of the token itself, in nats.
        likeliest: the token with the highest logit.
    """

    log_p: np.ndarray
    likeliest: np.ndarray


@torch.no_grad()
def predict(model: LoadedModel, rows: list[list[int]]) -> list[Predictions]:
    """Rows of at least two tokens. Riverrun's models carry their state from piece to piece, in constant memory; others
    read a row at once."""
    network = model.model
    if not isinstance(network, RiverrunForCausalLM):
        found = []
        for row in rows:
            ids = torch.tensor([row], device=model.device)
            found.append(_score(network(input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:]))
        return [Predictions(log_p[0], likeliest[0]) for log_p, likeliest in found]
    width = max(map(len, rows)) - 1
    pairs = [(np.array(row[:-1]), np.array(row[1:])) for row in rows]
    ids, targets = (x.clamp(min=0).to(model.device) for x in pad(pairs, width))  # what no row sees: causal
    cache, parts = network.make_cache(), []
    size = max(1, LOGITS // len(rows) // model.vocab_size)
    for start in range(0, width, size):
        piece = ids[:, start : start + size]
        layout = Layout.of_rows((len(rows), piece.shape[1]), piece.new_full((len(rows),), start))
        logits = network.lm_head(network.hidden_states(piece, layout, cache))
        parts.append(_score(logits, targets[:, start : start + size]))
    log_p, likeliest = (np.concatenate(part, axis=1) for part in zip(*parts))
    return [Predictions(log_p[i, : len(row) - 1], likeliest[i, : len(row) - 1]) for i, row in enumerate(rows)]


def _score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    return log_p.double().cpu().numpy(), logits.argmax(-1).cpu().numpy()
