"""The base of processors that look at one row at a time."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from transformers import LogitsProcessor


class RowProcessor(LogitsProcessor):
    """Changes the logits of each row by that row's own tokens alone; the given ones are left as they are."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = [self.row(tokens, row) for tokens, row in zip(input_ids.tolist(), scores)]
        return torch.stack(rows)  # type: ignore[return-value]

    @abstractmethod
    def row(self, tokens: list[int], scores: torch.Tensor) -> torch.Tensor:
        """The tokens so far and the next one's (V,) logits → new ones. What is −inf must stay so."""


def lowered(scores: torch.Tensor, penalties: Mapping[int, float]) -> torch.Tensor:
    """(V,) logits less the penalty of each token; those without one keep their bits."""
    if not penalties:
        return scores
    tokens = torch.tensor(list(penalties), device=scores.device)
    amounts = torch.tensor(list(penalties.values()), device=scores.device, dtype=scores.dtype)
    return scores.index_add(0, tokens, -amounts)
