"""JRT-RNN (Arora et al. 2024, arXiv 2407.05483, section 4): next tokens after a prefix, and masked tokens within it.

A row of T tokens is an encoder's region, its first M = `train.jrt.encoder_len`, and a decoder's, the rest. Prefix
linear attention reads the encoder's without causality (`prefix` of the model's forward pass). There, some inputs are
replaced by a mask token, and their own token is the target at the same place; elsewhere in the region there is none.
In the decoder's region the target is the next token. What is minimised is

    (w₁ · mean of the next tokens' losses + w₂ · mean of the masked tokens') / (w₁ + w₂)

The first token of the decoder's region is no target, as in the authors' code, though it could be predicted from the
last one of the encoder's without having been seen: those T − M − 1 targets, and the row's successor, which our rows
know, make T − M. A masked token is always replaced, never kept or drawn at random.

Documents that are packed into a row stay apart: one that lies in the encoder's region is only masked, one in the
decoder's is read causally, and one across the border is of both.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from riverrun.train.config import JRTConfig
from riverrun.train.data.packing import IGNORED, Batch, Row, collate
from riverrun.train.data.tokenizer import Tokenizer
from riverrun.train.objectives.objective import Objective

MASKS = zlib.crc32(b"jrt masks")
MASKED = "masked"  # (B, T) bool: where the target is the token itself


class JRT(Objective):
    """The held-out loss is that of the decoder's region after an encoder's without masks.

    Args:
        seed: of the recipe; which tokens are masked depends on it and the row's number alone.
        tokenizer: of the text, which must not have the mask token.

    Raises:
        ValueError: the mask token is one of the tokenizer's.
    """

    names = ("loss", "masked_loss")

    def __init__(self, config: JRTConfig, seed: int, tokenizer: Tokenizer | None):
        assert config.mask_id is not None
        if tokenizer is not None and config.mask_id < tokenizer.vocab_size:
            raise ValueError(
                f"train.jrt.mask_id={config.mask_id} is one of the {tokenizer.vocab_size} tokens of data.tokenizer: "
                f"set train.jrt.mask_id={tokenizer.vocab_size}, and model.vocab_size above it"
            )
        self.config, self.seed, self.mask_id = config, seed, config.mask_id
        total = config.ntp_weight + config.mlm_weight
        self.weights = (config.ntp_weight / total, config.mlm_weight / total)

    def batch(self, rows: Sequence[Row], numbers: Sequence[int], step: int) -> Batch:
        masked = np.stack([self._mask(row, number) for row, number in zip(rows, numbers)])
        batch = self._of_decoder(collate(rows))
        at = torch.from_numpy(masked)
        return replace(
            batch,
            input_ids=batch.input_ids.masked_fill(at, self.mask_id),
            targets=torch.where(at, batch.input_ids, batch.targets),
            extra={MASKED: at},
        )

    def held_out_batch(self, rows: Sequence[Row]) -> Batch:
        return self._of_decoder(collate(rows))

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return batch.num_targets, int(batch.extra[MASKED].sum())

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        return {"prefix": self.config.encoder_len}

    def losses(self, token_losses: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        masked = batch.extra[MASKED]
        return token_losses.masked_fill(masked, 0).sum(), token_losses.masked_fill(~masked, 0).sum()

    def _mask(self, row: Row, number: int) -> np.ndarray:
        """(T,) which tokens of the encoder's region are masked."""
        rng = np.random.default_rng([self.seed, MASKS, number])
        masked = np.zeros(len(row.input_ids), dtype=bool)
        masked[: self.config.encoder_len] = rng.random(self.config.encoder_len) < self.config.mask_share
        return masked

    def _of_decoder(self, batch: Batch) -> Batch:
        """With the next tokens of the decoder's region as the only targets."""
        targets = batch.targets.clone()
        targets[:, : self.config.encoder_len] = IGNORED
        return replace(batch, targets=targets, num_targets=int((targets != IGNORED).sum()))
