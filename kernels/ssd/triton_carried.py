"""`ssd` in Triton, for ranks that share sequences and exchange states on the way."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from riverrun.kernels.common.self_check import is_due
from riverrun.kernels.ssd.steps import step_sizes
from riverrun.kernels.ssd.triton_op import Exchange, check, scan, scan_backward

Inputs = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class CarriedSSD:
    """Inputs: x, dt, B, C, A, D, dt_bias, as `as_kernels_take` returns them, those of tokens first."""

    softplus: bool

    def transfer(self, inputs: Inputs, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """→ the decay (S, H, 1, 1)."""
        x, dt, _, _, A, _, bias = inputs
        assert x is not None and dt is not None and A is not None
        logs = (step_sizes(x, dt, bias, self.softplus).double() * A).cumsum(1)
        if cu_seqlens is None:
            total = logs[:, -1]
        else:
            total = F.pad(logs[0], (0, 0, 1, 0))[cu_seqlens.long()].diff(dim=0)
        return total.exp().float()[..., None, None]

    def run(self, inputs: Inputs, cu_seqlens: torch.Tensor | None, enter: Exchange) -> torch.Tensor:
        self._check(inputs, cu_seqlens, back=False)
        x, dt, B, C, A, D, bias = inputs
        return scan(x, dt, A, B, C, D, bias, None, cu_seqlens, self.softplus, enter=enter)[0]  # type: ignore[arg-type]

    def gradients(
        self,
        grad: torch.Tensor,
        inputs: Inputs,
        initial: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        leave: Exchange,
    ) -> Inputs:
        self._check(inputs, cu_seqlens, back=True)
        x, dt, B, C, A, D, bias = inputs
        of_x, of_dt, of_A, of_B, of_C, of_D, of_bias, _ = scan_backward(
            grad, None, x, dt, A, B, C, D, bias, initial, cu_seqlens, self.softplus, leave=leave  # type: ignore[arg-type]
        )  # fmt: skip
        return of_x, of_dt, of_B, of_C, of_A, None if D is None else of_D, None if bias is None else of_bias

    def _check(self, inputs: Inputs, cu_seqlens: torch.Tensor | None, *, back: bool) -> None:
        x, dt, B, _, _, D, bias = inputs
        assert x is not None and dt is not None and B is not None
        if is_due(x):
            check(x, dt, B, D, bias, True, cu_seqlens, self.softplus, back)

    def apply(self, transfer: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return transfer * state

    apply_adjoint = apply
