"""The language-model head and its cross-entropy in one op that never holds the logits of all tokens."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from riverrun.kernels.common.backend import resolve_backend

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

    The backward pass computes each chunk's logits again, so that the largest tensor either way is (chunk_size, V).
    Logits and softmax are float32 (float64 if `hidden` is float64), also for bfloat16 inputs and under autocast; the
    gradient of `weight` is summed over the chunks in that type.

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
    log_z, logit = _Logits.apply(hidden, weight.to(hidden.dtype), index, chunk_size, chosen == "triton")
    return cross_entropy_of(log_z, logit, valid, z_loss, reduction)


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
    return _Logits.apply(hidden, weight.to(hidden.dtype), index, chunk_size, chosen == "triton")


class _Logits(torch.autograd.Function):
    """log Z of each token's logits, and its logit at `index`. With p the softmax and y the one-hot row of the index,

    d log Z / d logits = p,    d logit / d logits = y.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, chunk_size: int, triton: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_z = hidden.new_empty(len(hidden), dtype=_dtype(hidden))
        picked = torch.empty_like(log_z)
        for rows in _chunks(len(hidden), chunk_size):
            logits = _product(hidden[rows], weight.T)
            if triton:
                from riverrun.kernels.linear_cross_entropy.triton_softmax import log_z as log_z_of

                log_z[rows], picked[rows] = log_z_of(logits, index[rows])
            else:
                log_z[rows] = logits.logsumexp(1)
                picked[rows] = logits.gather(1, index[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, index, log_z)
        ctx.chunk_size, ctx.triton = chunk_size, triton
        return log_z, picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_softmax: torch.Tensor, of_picked: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, index, log_z = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden), ctx.chunk_size):
            grad = _product(hidden[rows], weight.T)
            if ctx.triton:
                from riverrun.kernels.linear_cross_entropy.triton_softmax import softmax_gradient

                of_rows = (x[rows] for x in (log_z, of_softmax, -of_picked))
                grad = softmax_gradient(grad, index[rows], *of_rows, hidden.dtype)
            else:
                grad.sub_(log_z[rows, None]).exp_().mul_(of_softmax[rows, None])
                grad.scatter_add_(1, index[rows, None], of_picked[rows, None])
                grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _product(grad, weight).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *(None,) * 3


def tokens_of_chunk(x: torch.Tensor, V: int) -> int:
    """How many tokens' logits to hold at once: float32 (float64 if `x` is float64), on the device of `x`, V a token."""
    return max(1, (CHUNK_BYTES_OF_GPU if x.is_cuda else CHUNK_BYTES) // (V * _dtype(x).itemsize))


def _dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of low-precision matrices, summed and returned in float32; autocast has no say."""
    dtype = _dtype(a)
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != dtype:
            return torch.mm(a, b, out_dtype=dtype)
        return a.to(dtype) @ b.to(dtype)


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out += a @ b, in the dtype of `out`."""
    if not a.is_cuda or a.dtype == out.dtype:
        with torch.autocast(a.device.type, enabled=False):
            out.addmm_(a.to(out.dtype), b.to(out.dtype))
    elif torch.compiler.is_compiling():  # which cannot trace the product below
        out += _product(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
