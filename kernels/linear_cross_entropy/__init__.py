"""The language-model head and its cross-entropy in one op that never holds the logits of all tokens."""

from typing import NamedTuple

import torch

from riverrun.kernels.common.backend import resolve_backend
from riverrun.kernels.linear_cross_entropy.chunked import Logits, Losses, wide

# bytes that the logits of one chunk of tokens may take; a GPU's matrix products want thousands of tokens
CHUNK_BYTES, CHUNK_BYTES_OF_GPU = 64 * 2**20, 512 * 2**20


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
    backend: str = "auto",
) -> LinearCrossEntropy:
    """Cross-entropy of softmax(hidden · weightᵀ), computed for `chunk_size` tokens at a time.

    The largest tensor is (chunk_size, V) either way. Summed losses have their gradients computed in the forward pass,
    while a chunk's logits are there, for the sum loss + z_loss; if something else becomes of the two, and for
    reduction="none", the backward pass computes the logits again. Logits and softmax are float32 (float64 if `hidden`
    is float64), also for bfloat16 inputs and under autocast; the gradient of `weight` is summed over the chunks in that
    type.

    Args:
        hidden: (N, D).
        weight: (V, D); taken in the dtype of `hidden`.
        targets: (N,) integers in [0, V), or `ignore_index`: no loss and no gradient there.
        z_loss: weight of the squared log-partition, log²Z (PaLM, arXiv 2204.02311, §5).
        chunk_size: tokens a chunk; default: as many as have 64 MiB of logits, on a GPU 512 MiB.
        reduction: "sum" over tokens, or "none".
        backend: "auto", "chunked" or "triton", which takes one pass over the logits each way where torch takes several.

    Returns:
        loss: the cross-entropy in nats, without the z-loss: a scalar, or (N,) with zeros at ignored tokens.
        z_loss: the weighted z-loss, of the same shape. The gradients of both are exact for any upstream gradient.
        num_targets: how many targets are not `ignore_index`, an int64 scalar.

    Raises:
        ValueError: an argument of the wrong shape, a chunk size below 1, an unknown reduction or backend.
    """
    op = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected hidden (N, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{op}: targets must have shape (N,) = ({len(hidden)},), got {tuple(targets.shape)}")
    if reduction not in ("sum", "none"):
        raise ValueError(f"{op}: reduction must be 'sum' or 'none', got {reduction!r}")
    if backend == "reference":
        raise ValueError(f"{op}: there is no step-by-step form; use backend='chunked'")
    chosen = resolve_backend(op, backend, hidden, len(hidden), has_triton=True)
    if chunk_size is None:
        chunk_size = tokens_of_chunk(hidden, len(weight))
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1, got {chunk_size}")
    valid = targets != ignore_index
    index = targets.long().where(valid, 0)
    arguments = hidden, weight.to(hidden.dtype), index, chunk_size, chosen == "triton"
    if reduction == "none":
        log_z, logit = Logits.apply(*arguments)
        return cross_entropy_of(log_z, logit, valid, z_loss, reduction)
    loss, z = Losses.apply(*arguments, valid, z_loss, torch.is_grad_enabled())
    return LinearCrossEntropy(loss, z, valid.sum())


def cross_entropy_of(
    log_z: torch.Tensor, logit: torch.Tensor, valid: torch.Tensor, z_loss: float, reduction: str = "sum"
) -> LinearCrossEntropy:
    """The losses of tokens, from log Z of their logits, the targets' logits, and which of them count, (N,) each."""
    loss, z = (log_z - logit).where(valid, 0), (z_loss * log_z.square()).where(valid, 0)
    if reduction == "sum":
        loss, z = loss.sum(), z.sum()
    return LinearCrossEntropy(loss, z, valid.sum())


def linear_log_z(
    hidden: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a softmax over some of the vocabulary has to know of it: of the logits hidden · weightᵀ, computed in chunks
    of tokens each way as `linear_cross_entropy` does, log Σ exp and one of them.

    Args:
        hidden: (N, D).
        weight: (V, D); taken in the dtype of `hidden`.
        index: (N,) int64 in [0, V), which logit to return.

    Returns:
        log Z and the logits at `index`, (N,) float32 each (float64 if `hidden` is float64).
    """
    chosen = resolve_backend("linear_log_z", backend, hidden, len(hidden), has_triton=True)
    chunk_size = tokens_of_chunk(hidden, len(weight))
    return Logits.apply(hidden, weight.to(hidden.dtype), index, chunk_size, chosen == "triton")


def tokens_of_chunk(x: torch.Tensor, V: int) -> int:
    """How many tokens' logits to hold at once: float32 (float64 if `x` is float64), on the device of `x`, V a token."""
    return max(1, (CHUNK_BYTES_OF_GPU if x.is_cuda else CHUNK_BYTES) // (V * wide(x).itemsize))
