"""A linear recurrence's state carried over ranks, for kernels: what crosses is summed before gradients are computed.

Forward, each rank finds what its shard adds to a state, all gather that, and the recurrence runs once more from the
state that enters. Backward, each rank finds the adjoint of that state for its own outputs alone, all gather those, and
the gradients are computed once, with the adjoint of the state that leaves. Autograd through a summary of its own would
compute all gradients twice.
"""

from typing import Any, Protocol

import torch

from riverrun.modeling.parallel.context import Context

Inputs = tuple[torch.Tensor | None, ...]


class Recurrence(Protocol):
    """An affine recurrence in pieces. `inputs` are its own; `cu_seqlens` the bounds of packed sequences, or None."""

    def summary(
        self, inputs: Inputs, cu_seqlens: torch.Tensor | None, with_transfer: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """How sequences map a state: the transfer, as `apply` takes it, if wanted; and what they add, (S, …)."""

    def run(self, inputs: Inputs, initial: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """The outputs from the initial states (S, …)."""

    def adjoint(self, grad: torch.Tensor, inputs: Inputs, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """The gradient (S, …) of the initial states where that of the final ones is zero."""

    def gradients(
        self,
        grad: torch.Tensor,
        grad_final: torch.Tensor,
        inputs: Inputs,
        initial: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> Inputs:
        """Of the inputs, from those of the outputs and of the final states (S, …)."""

    def apply(self, transfer: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The transfer of a state."""

    def apply_adjoint(self, transfer: torch.Tensor, adjoint: torch.Tensor) -> torch.Tensor:
        """Its transpose, of an adjoint."""


@torch.compiler.disable
def carried(context: Context, recurrence: Recurrence, *inputs: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """This rank's outputs. The first `tokens` of the inputs are (B, T, …), or (1, B·T, …) where documents begin inside
    rows; the others belong to the whole."""
    with torch.autocast(context.device.type, enabled=False):  # states are float32
        return _Carried.apply(context, recurrence, tokens, *inputs)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: Context, recurrence: Recurrence, tokens: int, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        ends = *(t if t is None else context.tail(t) for t in inputs[:tokens]), *inputs[tokens:]
        transfer, added = recurrence.summary(ends, context.tail_seqlens, context.chain > 0)
        initial = context.initial(context.incoming(added, transfer, recurrence.apply))
        ctx.context, ctx.recurrence = context, recurrence
        ctx.save_for_backward(initial, transfer, *inputs)
        return recurrence.run(inputs, initial, context.cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        context, recurrence = ctx.context, ctx.recurrence
        initial, transfer, *inputs = ctx.saved_tensors
        grad = grad.contiguous()
        adjoints = recurrence.adjoint(grad, tuple(inputs), context.cu_seqlens)
        first = adjoints if context.cu_seqlens is None else adjoints[context.first]
        grad_final = context.final(context.leaving(first, transfer, recurrence.apply_adjoint))
        return None, None, None, *recurrence.gradients(grad, grad_final, tuple(inputs), initial, context.cu_seqlens)
