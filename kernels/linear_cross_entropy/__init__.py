"""The language-model head and its cross-entropy in one op that never holds the logits of all tokens."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

# logits that one chunk of tokens may take, in bytes
CHUNK_BYTES = 64 * 2**20


class LinearCrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns; see there."""

    loss: torch.Tensor
    z_loss: torch.Tensor
    num_targets: torch.Tensor


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    reduction: str = "sum",
) -> LinearCrossEntropy:
    """Cross-entropy of softmax(hidden · weightᵀ), computed for `chunk_size` tokens at a time.

    The backward pass computes each chunk's logits again, so that the largest tensor either way is (chunk_size, V).
    The softmax is in float32 (float64 for float64 input), and the weight's gradient is accumulated in that type.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int64 in [0, V), or `ignore_index`: no loss and no gradient there.
        z_loss: weight of the squared log-partition, log²Z (PaLM, arXiv 2204.02311, §5).
        chunk_size: tokens a chunk; default: as many as fit 64 MiB of logits.
        reduction: "sum" over tokens, or "none".

    Returns:
        loss: the cross-entropy in nats: a scalar, or (N,) with zeros at ignored tokens. Without the z-loss.
        z_loss: the weighted z-loss, of the same shape. Both carry gradients.
        num_targets: how many targets were not ignored, int64 scalar.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    N, D = hidden.shape if hidden.dim() == 2 else (-1, -1)
    if N < 0 or weight.dim() != 2 or weight.shape[1] != D or targets.shape != (N,):
        raise ValueError(
            "linear_cross_entropy: expected hidden (N, D), weight (V, D) and targets (N,), got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if reduction not in ("sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'sum' or 'none', got {reduction!r}")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES // (weight.shape[0] * dtype.itemsize))
    loss, z = _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, ignore_index, chunk_size)
    if reduction == "sum":
        loss, z = loss.sum(), z.sum()
    return LinearCrossEntropy(loss, z, (targets != ignore_index).sum())


class _LinearCrossEntropy(torch.autograd.Function):
    """Per-token cross-entropy and z-loss, recomputed chunk by chunk in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_weight, ignore_index, chunk_size):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_z = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        picked = torch.empty_like(log_z)
        valid = targets != ignore_index
        index = targets.where(valid, 0)
        for rows in _chunks(len(hidden), chunk_size):
            logits = F.linear(hidden[rows], weight).to(dtype)
            log_z[rows] = logits.logsumexp(1)
            picked[rows] = logits.gather(1, index[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, index, valid, log_z)
        ctx.z_weight, ctx.chunk_size = z_weight, chunk_size
        return (log_z - picked) * valid, z_weight * log_z.square() * valid

    @staticmethod
    def backward(ctx, grad_loss, grad_z):
        hidden, weight, index, valid, log_z = ctx.saved_tensors
        dtype = log_z.dtype
        grad_loss = grad_loss.to(dtype) * valid
        # the gradient of a token's logits is softmax times this, less grad_loss at the target
        grad_softmax = grad_loss + grad_z.to(dtype) * valid * 2 * ctx.z_weight * log_z
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden), ctx.chunk_size):
            logits = F.linear(hidden[rows], weight).to(dtype)
            grad = logits.sub_(log_z[rows, None]).exp_().mul_(grad_softmax[rows, None])
            grad.scatter_add_(1, index[rows, None], -grad_loss[rows, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden[rows]).to(dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
