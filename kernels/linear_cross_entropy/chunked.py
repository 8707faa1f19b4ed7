"""The logits of a chunk of tokens at a time, and what follows from them, each way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Logits(torch.autograd.Function):
    """log Z of each token's logits, and its logit at `index`; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, chunk_size: int, triton: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_z = hidden.new_empty(len(hidden), dtype=wide(hidden))
        picked = torch.empty_like(log_z)
        for rows in _chunks(len(hidden), chunk_size):
            log_z[rows], picked[rows] = _read(_product(hidden[rows], weight.T), index[rows], triton)
        ctx.save_for_backward(hidden, weight, index, log_z)
        ctx.chunk_size, ctx.triton = chunk_size, triton
        return log_z, picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_z: torch.Tensor, of_picked: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, index, log_z = ctx.saved_tensors
        grads = _Gradients(hidden, weight, index, ctx.needs_input_grad, ctx.triton)
        return *grads.again(log_z, of_log_z, of_picked, ctx.chunk_size), *(None,) * 3


class Losses(torch.autograd.Function):
    """Cross-entropy and z-loss, summed over the tokens where `valid`.

    With `differentiate`, their sum's gradients are computed along the way: three matrix products a chunk, where
    computing the logits again takes four. The backward pass only scales them if the upstream gradient of both losses is
    one and the same tensor, as it is where they are added up first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        index: torch.Tensor,
        chunk_size: int,
        triton: bool,
        valid: torch.Tensor,
        z_loss: float,
        differentiate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_z = hidden.new_empty(len(hidden), dtype=wide(hidden))
        picked = torch.empty_like(log_z)
        needed = [differentiate and needs for needs in ctx.needs_input_grad[:2]]
        grads = _Gradients(hidden, weight, index, needed, triton)
        for rows in _chunks(len(hidden), chunk_size):
            logits = _product(hidden[rows], weight.T)
            log_z[rows], picked[rows] = _read(logits, index[rows], triton)
            if any(needed):
                counts = valid[rows].to(log_z.dtype)
                grads.add(logits, rows, log_z, counts * (1 + 2 * z_loss * log_z[rows]), -counts)
        ctx.save_for_backward(hidden, weight, index, valid, log_z, grads.hidden, grads.weight)
        ctx.chunk_size, ctx.triton, ctx.z_loss = chunk_size, triton, z_loss
        return (log_z - picked).where(valid, 0).sum(), (z_loss * log_z.square()).where(valid, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: torch.Tensor, of_z: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, index, valid, log_z, *made = ctx.saved_tensors
        if of_loss is of_z or not ctx.z_loss:
            grads = [
                None if grad is None else (grad * of_loss).to(like.dtype) for grad, like in zip(made, (hidden, weight))
            ]
        else:
            both = of_loss + 2 * ctx.z_loss * of_z * log_z
            again = _Gradients(hidden, weight, index, ctx.needs_input_grad, ctx.triton)
            grads = list(again.again(log_z, both.where(valid, 0), (-of_loss * valid).to(log_z.dtype), ctx.chunk_size))
        return *grads, *(None,) * 6


class _Gradients:
    """Those of `hidden`, in its type, and of `weight`, summed over chunks in a wide one, as far as they are needed.

    With p the softmax and y the one-hot row of the index, d log Z / d logits = p and d logit / d logits = y.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, needed: Sequence[bool], triton: bool
    ):
        self.inputs, self.triton = (hidden, weight, index), triton
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide(hidden)) if needed[1] else None

    def add(
        self,
        logits: torch.Tensor,
        rows: slice,
        log_z: torch.Tensor,
        of_log_z: torch.Tensor,
        of_picked: torch.Tensor,
    ) -> None:
        """Of a chunk, which `of_log_z` and `of_picked` are cut to; `logits` may be overwritten."""
        hidden, weight, index = self.inputs
        if self.triton:
            from riverrun.kernels.linear_cross_entropy.triton_softmax import softmax_gradient

            grad = softmax_gradient(logits, index[rows], log_z[rows], of_log_z, -of_picked, hidden.dtype)
        else:
            grad = logits.sub_(log_z[rows, None]).exp_().mul_(of_log_z[:, None])
            grad = grad.scatter_add_(1, index[rows, None], of_picked[:, None]).to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _product(grad, weight).to(hidden.dtype)
        if self.weight is not None:
            _add_product(self.weight, grad.T, hidden[rows])

    def again(
        self, log_z: torch.Tensor, of_log_z: torch.Tensor, of_picked: torch.Tensor, chunk_size: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of all tokens, from their logits computed again; both in the types of what they are gradients of."""
        hidden, weight, _ = self.inputs
        for rows in _chunks(len(hidden), chunk_size):
            self.add(_product(hidden[rows], weight.T), rows, log_z, of_log_z[rows], of_picked[rows])
        return self.hidden, None if self.weight is None else self.weight.to(weight.dtype)


def wide(x: torch.Tensor) -> torch.dtype:
    """Of logits and sums: float32, or float64 if `x` is."""
    return torch.promote_types(x.dtype, torch.float32)


def _read(logits: torch.Tensor, index: torch.Tensor, triton: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ exp of each row, and its element at `index`."""
    if triton:
        from riverrun.kernels.linear_cross_entropy.triton_softmax import log_z

        return log_z(logits, index)
    return logits.logsumexp(1), logits.gather(1, index[:, None]).squeeze(1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of low-precision matrices, summed and returned in float32; autocast has no say."""
    dtype = wide(a)
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
