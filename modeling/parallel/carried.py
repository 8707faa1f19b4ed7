"""A linear recurrence's state carried over ranks, for kernels: what crosses is exchanged in the middle of their work.

Forward, each rank finds the state that its shard would leave from zeros, all gather those, and it goes on from the one
that enters. Backward, each finds the adjoint of the state that enters for its own outputs alone, all gather those, and
it goes on with the adjoint of the state that leaves. Walks of segments share the work that either half needs; autograd
through a summary of its own would compute all gradients twice.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from riverrun.modeling.parallel.context import Context

Inputs = tuple[torch.Tensor | None, ...]
Exchange = Callable[[torch.Tensor], torch.Tensor]


class Recurrence(Protocol):
    """An affine recurrence. `inputs` are its own; `cu_seqlens` the bounds of packed sequences, or None."""

    def transfer(self, inputs: Inputs, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """How sequences map a state, as `apply` takes it."""

    def run(self, inputs: Inputs, cu_seqlens: torch.Tensor | None, enter: Exchange) -> torch.Tensor:
        """The outputs. `enter` makes the initial states (S, …) of the final ones that zeros would have led to."""

    def gradients(
        self,
        grad: torch.Tensor,
        inputs: Inputs,
        initial: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        leave: Exchange,
    ) -> Inputs:
        """Of the inputs, from that of the outputs. `leave` makes the final states' adjoints (S, …) of those that zeros
        would have led to at the initial ones."""

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
        transfer = initial = None
        if context.chain:
            tail = *(t if t is None else context.tail(t) for t in inputs[:tokens]), *inputs[tokens:]
            transfer = recurrence.transfer(tail, context.tail_seqlens)

        def enter(ends: torch.Tensor) -> torch.Tensor:
            nonlocal initial
            initial = context.initial(context.incoming(context.of_last(ends), transfer, recurrence.apply))
            return initial

        outputs = recurrence.run(inputs, context.cu_seqlens, enter)
        ctx.context, ctx.recurrence = context, recurrence
        ctx.save_for_backward(initial, transfer, *inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        context, recurrence = ctx.context, ctx.recurrence
        initial, transfer, *inputs = ctx.saved_tensors

        def leave(adjoints: torch.Tensor) -> torch.Tensor:
            first = adjoints if context.cu_seqlens is None else adjoints[context.first]
            return context.final(context.leaving(first, transfer, recurrence.apply_adjoint))

        gradients = recurrence.gradients(grad.contiguous(), tuple(inputs), initial, context.cu_seqlens, leave)
        return None, None, None, *gradients
