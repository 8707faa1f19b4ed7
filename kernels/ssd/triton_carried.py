"""`ssd` in Triton, in the pieces that ranks which share sequences run between what they exchange."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from riverrun.kernels.ssd.steps import step_sizes
from riverrun.kernels.ssd.triton_op import _backward, _forward, adjoint

Inputs = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class CarriedSSD:
    """Inputs: x, dt, B, C, A, D, dt_bias, as `as_kernels_take` returns them, those of tokens first."""

    softplus: bool

    def summary(
        self, inputs: Inputs, cu_seqlens: torch.Tensor | None, with_transfer: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """→ the decay (S, H, 1, 1), if wanted, and the final states from zeros (S, H, P, N)."""
        x, dt, B, _, A, _, bias = inputs
        assert x is not None and dt is not None and A is not None
        _, added = _forward(x, dt, A, B, B, None, bias, None, cu_seqlens, self.softplus)
        if not with_transfer:
            return None, added
        logs = (step_sizes(x, dt, bias, self.softplus).double() * A).cumsum(1)
        if cu_seqlens is None:
            total = logs[:, -1]
        else:
            total = F.pad(logs[0], (0, 0, 1, 0))[cu_seqlens.long()].diff(dim=0)
        return total.exp().float()[..., None, None], added

    def run(self, inputs: Inputs, initial: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        x, dt, B, C, A, D, bias = inputs
        return _forward(x, dt, A, B, C, D, bias, initial, cu_seqlens, self.softplus)[0]

    def adjoint(self, grad: torch.Tensor, inputs: Inputs, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        x, dt, B, C, A, _, bias = inputs
        return adjoint(grad, x, dt, A, B, C, bias, cu_seqlens, self.softplus)  # type: ignore[arg-type]

    def gradients(
        self,
        grad: torch.Tensor,
        grad_final: torch.Tensor,
        inputs: Inputs,
        initial: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> Inputs:
        x, dt, B, C, A, D, bias = inputs
        grads = _backward(grad, grad_final, x, dt, A, B, C, D, bias, initial, cu_seqlens, self.softplus)
        of_x, of_dt, of_A, of_B, of_C, of_D, of_bias, _ = grads
        return of_x, of_dt, of_B, of_C, of_A, None if D is None else of_D, None if bias is None else of_bias

    def apply(self, transfer: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return transfer * state

    apply_adjoint = apply
