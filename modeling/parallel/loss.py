"""Embedding and loss of a vocabulary that tensor-parallel ranks share: each has the rows of its tokens."""

import torch
from torch.nn import functional as F

from riverrun.kernels.linear_cross_entropy import LinearCrossEntropy, cross_entropy_of, linear_log_z
from riverrun.modeling.parallel.collectives import all_gather, reduce_scatter
from riverrun.modeling.parallel.mesh import Axis


def sharded_embedding(input_ids: torch.Tensor, weight: torch.Tensor, tp: Axis) -> torch.Tensor:
    """Embeddings (B·T / tp.size, D) of this rank's part of the flattened tokens.

    Args:
        input_ids: (B, T), the same on all ranks.
        weight: (V / tp.size, D), this rank's tokens.
    """
    index, mine = _local(input_ids.flatten(), len(weight), tp)
    return reduce_scatter(F.embedding(index, weight) * mine[:, None], tp)


def sharded_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tp: Axis, *, z_loss: float, ignore_index: int
) -> LinearCrossEntropy:
    """`linear_cross_entropy` of this rank's part of the tokens; the loss of all is the sum over the ranks.

    Every rank computes all tokens' logits of its part of the vocabulary; the ranks exchange two numbers a token.

    Args:
        hidden: (N / tp.size, D), of this rank's tokens.
        weight: (V / tp.size, D), of its part of the vocabulary.
        targets: (N,), of all tokens.
    """
    index, mine = _local(targets, len(weight), tp)
    log_z, logit = linear_log_z(all_gather(hidden, tp), weight, index)
    both = all_gather(torch.stack([log_z, logit.where(mine, 0)])[None], tp)[..., tp.share(len(targets))]
    valid = targets[tp.share(len(targets))] != ignore_index
    return cross_entropy_of(both[:, 0].logsumexp(0), both[:, 1].sum(0), valid, z_loss)


def _local(tokens: torch.Tensor, size: int, tp: Axis) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of this rank's `size` tokens each is (0 for others), and whether it is one of them."""
    index = tokens - tp.rank * size
    mine = (index >= 0) & (index < size)
    return index.where(mine, 0), mine
