"""Collectives that autograd differentiates.

The whole's loss is the sum of the losses of all ranks. So every collective's backward pass is its adjoint: that of a
gathering is a scattering sum, that of a sum is a sum. All ranks of an axis must call the same collectives in the same
order, in the backward pass as well: a rank that has no use for a result still has to let the gradient flow through it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist

from riverrun.modeling.parallel.mesh import Axis


@torch.compiler.disable
def all_gather(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    """The ranks' tensors of equal shape side by side along `dim`; backward: the sum of the gradients of each part."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dim)


@torch.compiler.disable
def reduce_scatter(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    """The sum over the ranks, of which this rank gets its part along `dim`; backward: all parts' gradients gathered."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim)


@torch.compiler.disable
def all_reduce(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum over the ranks; backward: the sum of their gradients."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis)


@torch.compiler.disable
def all_to_all(x: torch.Tensor, axis: Axis, split: int, join: int) -> torch.Tensor:
    """Part r of `x` along dimension `split` goes to rank r; the parts received lie side by side along `join`."""
    return x if axis.size == 1 else _AllToAll.apply(x, axis, split, join)


@torch.compiler.disable
def shift(x: torch.Tensor, axis: Axis, lost: torch.Tensor | None = None) -> torch.Tensor:
    """The rank before's tensor, a small one; zeros on the first, and where `lost` is set. Backward: the gradient goes
    to the rank before."""
    return torch.zeros_like(x) if axis.size == 1 else _Shift.apply(x, axis, lost)


def depend(x: torch.Tensor, collected: torch.Tensor) -> torch.Tensor:
    """`x`, through which a gradient of zeros also reaches `collected`, so that its collective's backward pass runs."""
    return _Depend.apply(x, collected)


def gather_parts(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    """`all_gather` without a gradient."""
    parts = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=axis.group)
    return parts if dim == 0 else torch.cat(parts.chunk(axis.size), dim)


def scatter_sum(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    """`reduce_scatter` without a gradient."""
    parts = x.contiguous() if dim == 0 else torch.cat(x.chunk(axis.size, dim))
    out = parts.new_empty(parts.shape[0] // axis.size, *parts.shape[1:])
    dist.reduce_scatter_tensor(out, parts, group=axis.group)
    return out


def to_host(x: torch.Tensor) -> Callable[[], list[float]]:
    """Sends a small tensor to the host. What is returned waits for it alone, whatever was launched meanwhile."""
    if x.device.type == "cpu":
        return x.tolist
    copy = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.current_stream(x.device).record_event()

    def wait() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return wait


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return gather_parts(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return scatter_sum(grad, ctx.axis, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        assert x.shape[dim] % axis.size == 0, f"{x.shape[dim]} does not divide into {axis.size}"
        ctx.axis, ctx.dim = axis, dim
        return scatter_sum(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gather_parts(grad, ctx.axis, ctx.dim), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _sum(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _sum(grad, ctx.axis), None


def _sum(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=axis.group)
    return x


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, split: int, join: int) -> torch.Tensor:
        assert x.shape[split] % axis.size == 0, f"{x.shape[split]} does not divide into {axis.size}"
        ctx.axis, ctx.split, ctx.join = axis, split, join
        return _exchange(x, axis, split, join)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchange(grad, ctx.axis, ctx.join, ctx.split), None, None, None


def _exchange(x: torch.Tensor, axis: Axis, split: int, join: int) -> torch.Tensor:
    parts = torch.stack(x.chunk(axis.size, split))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=axis.group)
    return torch.cat(list(received), join)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, lost: torch.Tensor | None) -> torch.Tensor:
        ctx.axis, ctx.lost = axis, lost
        before = pass_on(x, axis, 1)
        return before if lost is None else before.masked_fill_(lost, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return pass_on(grad if ctx.lost is None else grad.masked_fill(ctx.lost, 0), ctx.axis, -1), None, None


def pass_on(x: torch.Tensor, axis: Axis, step: int) -> torch.Tensor:
    """`shift` by `step` ranks, without a gradient. By a gathering of all: that costs the host less than a
    pair of transfers, and what is passed on is small."""
    parts, source = gather_parts(x[None], axis), axis.rank - step
    return parts[source] if 0 <= source < axis.size else torch.zeros_like(parts[0])


@torch.compiler.disable
def with_end(x: torch.Tensor, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` (B, T, …), and its tokens from `begin` on; for one that is used once, by what makes a new gradient of it:
    that of the end is added in place, which spares two passes over all of it."""
    return _WithEnd.apply(x, begin)


class _WithEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.begin = begin
        return x.view_as(x), x[:, begin:].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_end: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad[:, ctx.begin :] += grad_end
        return grad, None


class _Depend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, collected: torch.Tensor) -> torch.Tensor:
        ctx.like = collected.new_empty(()).expand(collected.shape)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.zeros_like(ctx.like)
