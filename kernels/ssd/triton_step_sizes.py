"""The step sizes of one call of `ssd`, and their gradients: launches of `triton_steps.py`."""

from dataclasses import dataclass
from typing import Any

import torch

from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.ssd.triton_launch import Launch
from riverrun.kernels.ssd.triton_steps import steps_backward_kernel, steps_kernel

HEADS = 16  # of a program, at most


@dataclass(frozen=True)
class Steps:
    """
    Attributes:
        dt: (B·T, H).
        bias: (H,), or None.
        A: (H,).
        softplus: Δ = softplus(dt + bias), or dt + bias.
        T: tokens of a row.
    """

    launch: Launch
    dt: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    softplus: bool
    T: int

    def _inputs(self) -> tuple[torch.Tensor, ...]:
        return self.dt, self.A if self.bias is None else self.bias, self.A

    def _grid_and_options(self) -> tuple[tuple[int, int], dict[str, Any]]:
        H = self.launch.dims["H"]
        heads = min(HEADS, power_of_2_from(H))
        return (self.launch.chunks.num_chunks, ceil_div(H, heads)), {
            "H": H, "Q": self.launch.dims["Q"], "BH": heads, "DT_STRIDE": self.dt.stride(0),
            "HAS_BIAS": self.bias is not None, "SOFTPLUS": self.softplus, "PACKED": self.launch.chunks.packed,
        }  # fmt: skip

    def make(self) -> tuple[torch.Tensor, torch.Tensor]:
        """→ Δ and a (M, H, Q), float32."""
        chunks, dims = self.launch.chunks, self.launch.dims
        steps, decays = self.A.new_empty(2, chunks.num_chunks, dims["H"], dims["Q"])
        grid, options = self._grid_and_options()
        steps_kernel[grid](*self._inputs(), steps, decays, *chunks.tensors[2:], self.T, **options)
        return steps, decays

    def gradients(
        self,
        steps: tuple[torch.Tensor, torch.Tensor],
        by_read: torch.Tensor,
        flow: torch.Tensor,
        by_a: torch.Tensor,
        by_d: torch.Tensor,
        by_written: torch.Tensor,
        dt: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """→ the gradients of `dt` (B, T, H), the bias (H,) (empty if there is none) and A (H,)."""
        chunks, H = self.launch.chunks, self.launch.dims["H"]
        grad_dt = dt.new_empty(dt.shape)
        grad_bias = self.A.new_zeros(0 if self.bias is None else (chunks.num_chunks, H))
        grad_A = self.A.new_zeros(chunks.num_chunks, H)
        grid, options = self._grid_and_options()
        steps_backward_kernel[grid](
            *self._inputs(), *steps, by_read, flow, by_a, by_d, by_written,
            grad_dt, grad_bias, grad_A, *chunks.tensors[2:], self.T, **options,
        )  # fmt: skip
        return grad_dt, grad_bias if self.bias is None else grad_bias.sum(0), grad_A.sum(0)
