"""DITTO (Xu et al. 2022, arXiv 2206.02369): learn from repeated sentences that repeating becomes less likely.

A language model's probability of a sentence grows with every time that the sentence has just been repeated. DITTO
trains against that, after ordinary pretraining. A step is of one kind on all ranks: next-token prediction, or, with
`train.ditto.probability`, on pseudo-repetitions. A row is then replaced by the beginning of

    the sentence before s, s, s, s, …

for a sentence s of the row, and what is minimised is the mean over the tokens of all copies but the first of

    −log(1 − |p_n − λ · sg(p_{n−1})|)

with p_n the probability of the token in copy n, p_{n−1} that of the same token in the copy before, and sg a value that
no gradient goes through. Its minimum is p_n = λ^{n−1} p_1: probabilities that decay with each copy.

Sentences. A row is a piece of packed documents. A sentence ends after a delimiter, or after the last of several that
follow each other ("...", "?!"); a document's edge within the row ends one too. s lies between two delimiters of one
document, so that it is whole, and twice into the row. The sentence before s is of the same document, and may be what
the row has of it. A row without such a sentence is left out: in a step of repetitions it counts for no loss.
`ditto_left_out` in the metrics is the share of these rows.
"""

import zlib
from collections.abc import Collection, Sequence

import numpy as np
import torch

from riverrun.train.config import DittoConfig
from riverrun.train.data.packing import IGNORED, Batch, Row, collate
from riverrun.train.data.tokenizer import Tokenizer
from riverrun.train.objectives.objective import Objective

STEP, ROW = zlib.crc32(b"ditto step"), zlib.crc32(b"ditto row")
LEAST = 1e-20  # of what the logarithm is taken of
PERIOD = "period"  # distance to the prediction of the same token in the copy before, 0 where there is no loss


class Ditto(Objective):
    """Steps of next-token prediction, and steps on pseudo-repetitions.

    Args:
        delimiters: the ids of tokens that end a sentence.
        seed: of the recipe.
    """

    names = ("loss", "ditto", "ditto_left_out")
    weights = (1.0, 1.0, 0.0)

    def __init__(self, config: DittoConfig, delimiters: Collection[int], seed: int):
        self.config, self.seed = config, seed
        self.delimiters = np.array(sorted(delimiters), np.int64)

    def repeats(self, step: int) -> bool:
        """Whether a training step is on pseudo-repetitions."""
        return bool(np.random.default_rng([self.seed, STEP, step]).random() < self.config.probability)

    def batch(self, rows: Sequence[Row], numbers: Sequence[int], step: int) -> Batch:
        if not self.repeats(step):
            return collate(rows)
        made = [self._repetition(row, number) for row, number in zip(rows, numbers)]
        batch = collate([row for row, _ in made])
        batch.extra[PERIOD] = torch.from_numpy(np.stack([period for _, period in made]))
        return batch

    def counts(self, batch: Batch) -> tuple[int, ...]:
        period = batch.extra.get(PERIOD)
        return (batch.num_targets, 0, 0) if period is None else (0, int((period > 0).sum()), len(period))

    def losses(self, token_losses: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        period = batch.extra.get(PERIOD)
        zero = token_losses.new_zeros(())
        if period is None:
            return token_losses.sum(), zero, zero
        probability = torch.exp(-token_losses)
        place = torch.arange(period.shape[1], device=period.device)
        before = probability.detach().gather(1, place - period)
        distance = (probability - self.config.decay * before).abs()[period > 0]
        left_out = (period == 0).all(dim=1).sum()
        return zero, -torch.log((1 - distance).clamp(min=LEAST)).sum(), left_out.to(zero.dtype)

    def _repetition(self, row: Row, number: int) -> tuple[Row, np.ndarray]:
        """The pseudo-repetition of a row, and its `PERIOD` (T,)."""
        T = len(row.input_ids)
        found = sentences(row, self.delimiters)
        if not found:
            return Row(row.input_ids, np.full_like(row.targets, IGNORED), row.starts), np.zeros(T, np.int64)
        start, middle, end = found[np.random.default_rng([self.seed, ROW, number]).integers(len(found))]
        prefix, length = middle - start, end - middle
        tokens = np.concatenate([row.input_ids[start:middle], np.resize(row.input_ids[middle:end], T + 1 - prefix)])
        predicts = np.arange(1, T + 1)  # the places of the targets
        period = np.where(predicts >= prefix + length, length, 0)
        return Row(tokens[:-1], tokens[1:], np.array([], np.int64)), period


def sentences(row: Row, delimiters: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, middle, end) of each pair of neighbours in one document of the row: the sentence [middle, end) lies
    between two delimiters and is twice in a row that begins with [start, middle)."""
    T, found = len(row.input_ids), []
    is_delimiter = np.isin(row.input_ids, delimiters)
    for first, last in zip([0, *row.starts], [*row.starts, T]):
        mark = is_delimiter[first:last]
        closes = mark & ~np.append(mark[1:], False)  # the last of several
        ends = first + 1 + np.flatnonzero(closes)
        bounds = [first, *ends.tolist()]
        found += [(int(a), b, c) for a, b, c in zip(bounds, bounds[1:], bounds[2:]) if b - a + 2 * (c - b) <= T]
    return found


def delimiter_ids(config: DittoConfig, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens whose text, spaces around it apart, is one of the delimiters: a vocabulary often has several.

    Raises:
        ValueError: no tokenizer to look into, or none of its tokens is a delimiter.
    """
    if config.delimiter_ids is not None:
        found = config.delimiter_ids
    elif tokenizer is None:
        raise ValueError(
            "train.objective='ditto' has to know the tokens that end a sentence: name data.tokenizer, or give their "
            "ids in train.ditto.delimiter_ids"
        )
    else:
        wanted = set(config.delimiters)
        found = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip(" ") in wanted]
    if not found:
        raise ValueError(
            f"no token ends sentences: none has the text of train.ditto.delimiters={config.delimiters}; name others, "
            "or give ids in train.ditto.delimiter_ids"
        )
    return found
