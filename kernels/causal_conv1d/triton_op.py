"""The Triton convolution as a torch operator: launches and gradients. The method is told in `triton_kernels.py`."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from riverrun.kernels.causal_conv1d.chunked import causal_conv1d_chunked
from riverrun.kernels.causal_conv1d.triton_kernels import backward_kernel, forward_kernel, initial_gradient_kernel
from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due, rounding
from riverrun.kernels.common.triton_documents import document_positions
from riverrun.kernels.common.whole import ceil_div, power_of_2_from


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    Attributes:
        channels: of a program; fewer where there are fewer.
        per_thread: channels that a thread holds.
        group: tokens that are loaded at a time.
        steps: tokens that a lane runs through, a multiple of `group`.
    """

    channels: int
    per_thread: int
    group: int
    steps: int

    @property
    def warps(self) -> int:
        return max(1, self.channels // (32 * self.per_thread))

    def lanes(self, B: int, T: int, overlap: int) -> int:
        """Of B rows of T tokens, where `overlap` of a lane's tokens belong to the next."""
        return B * ceil_div(T, self.steps - overlap)

    @lru_cache(maxsize=256)  # noqa: B019 - of the two launches below, which stay
    def fitted(self, B: int, T: int, D: int, unit: int, overlap: int, multiprocessors: int) -> "Launch":
        """For D channels, those of a unit all in one program; with shorter lanes where these would leave the device
        idle."""
        launch = replace(self, channels=max(unit, min(self.channels, power_of_2_from(D))))
        warps = ceil_div(D, launch.channels) * launch.warps
        while launch.steps > SHORTEST and launch.lanes(B, T, overlap) * warps < FULL * multiprocessors:
            launch = replace(launch, steps=launch.steps // 2)
        return replace(launch, steps=min(launch.steps, ceil_div(T + overlap, self.group) * self.group))

    @property
    def options(self) -> dict[str, Any]:
        return {"BD": self.channels, "num_warps": self.warps}


FORWARD = Launch(channels=512, per_thread=8, group=8, steps=128)
BACKWARD = Launch(channels=512, per_thread=4, group=4, steps=128)
SHORTEST = 16  # steps of a lane, more than the largest overlap
FULL = 16  # warps a multiprocessor


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, T, D) → (B·T, D) with neighbouring channels: a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[2])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _padded(D: int, unit: int | None) -> tuple[int, int]:
    """The channels of a unit (0: there are none) and of all, where those of a unit are padded to a power of 2."""
    size = 0 if unit is None else power_of_2_from(unit)
    return size, D if unit is None else D // unit * size


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    unit: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ y (B, T, D), final state (S, W − 1, D), both in the dtype of `x`."""
    (B, T, D), W = x.shape, weight.shape[1]
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    size, width = _padded(D, unit)
    launch = FORWARD.fitted(B, T, width, size, 0, multiprocessors(x))
    rows = _rows(x)
    y, final = x.new_empty(B, T, D), x.new_empty(S, W - 1, D)
    lanes = launch.lanes(B, T, 0)
    bounds, positions = (y, y) if cu_seqlens is None else (cu_seqlens, document_positions(cu_seqlens, T))
    forward_kernel[((lanes + S) * ceil_div(width, launch.channels),)](
        rows, weight, weight if bias is None else bias, final if initial is None else initial,
        bounds, positions, y, final, T, rows.stride(0), launch.steps, lanes,
        D=D, W=W, SILU=silu, UNIT=unit or 0, UNIT_P=size, HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None,
        PACKED=cu_seqlens is not None, U=launch.group, **launch.options,
    )  # fmt: skip
    return y, final


def convolve_backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    unit: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of x, of weight and bias (W + 1, D) in float32, and of the initial state (empty if none)."""
    (B, T, D), W = x.shape, weight.shape[1]
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    size, width = _padded(D, unit)
    launch = BACKWARD.fitted(B, T, width, size, W - 1, multiprocessors(x))
    rows, grad_rows = _rows(x), _rows(grad_y)
    grad_x = x.new_empty(B, T, D)
    columns, lanes = ceil_div(width, launch.channels), launch.lanes(B, T, W - 1)
    shares = x.new_empty(lanes, W + 1, D, dtype=torch.float32)
    grad_initial = x.new_empty(0 if initial is None else initial.shape)
    tensors = (
        grad_rows, grad_x if grad_final is None else grad_final,
        rows, weight, weight if bias is None else bias, grad_x if initial is None else initial,
    )  # fmt: skip
    bounds, positions = (grad_x, grad_x) if cu_seqlens is None else (cu_seqlens, document_positions(cu_seqlens, T))
    strides = grad_rows.stride(0), rows.stride(0)
    options = launch.options | {
        "D": D, "W": W, "SILU": silu, "UNIT": unit or 0, "UNIT_P": size,
        "HAS_BIAS": bias is not None, "HAS_FINAL": grad_final is not None, "PACKED": cu_seqlens is not None,
    }  # fmt: skip
    backward_kernel[(lanes * columns,)](
        *tensors, positions, grad_x, shares, T, *strides, launch.steps,
        HAS_INITIAL=initial is not None, U=launch.group, **options,
    )  # fmt: skip
    if initial is not None and W > 1:
        initial_gradient_kernel[(S * columns,)](*tensors, bounds, grad_initial, T, *strides, **options)
    return grad_x, shares.sum(0), grad_initial


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    has_initial: bool,
    packed: bool,
    unit: int | None,
) -> None:
    """The self-check of the kernels for such tensors."""
    D, W = weight.shape

    def compare() -> float:
        draw = draws(x.device)
        B, T, S = (1, 60, 4) if packed else (2, 30, 2)
        cu_seqlens = torch.tensor([0, 1, 3, 20, 60], dtype=torch.int32, device=x.device) if packed else None
        u, taps, offset = draw(B, T, D).to(x.dtype), draw(D, W).to(weight.dtype), None
        if bias is not None:
            offset = draw(D).to(bias.dtype)
        initial = draw(S, W - 1, D).to(x.dtype) if has_initial else None
        upstream = draw(B, T, D).to(x.dtype)
        rest = silu, initial, cu_seqlens, unit
        grad_x, shares, grad_initial = convolve_backward(upstream, None, u, taps, offset, *rest)
        got = [*convolve(u, taps, offset, *rest), grad_x, shares[:W].T]
        got += [] if bias is None else [shares[W]]
        got += [] if initial is None else [grad_initial]

        def chunked(x, weight, bias, initial):
            initial = x.new_zeros(S, W - 1, D) if initial is None else initial
            return causal_conv1d_chunked(x, weight, bias, silu, initial, cu_seqlens, unit)

        return deviation(got, in_double(chunked, (u, taps, offset, initial), upstream))

    sizes: dict[str, object] = {
        "D": D,
        "W": W,
        "silu": silu,
        "unit": unit,
        "bias": bias is not None,
        "initial": has_initial,
        "packed": packed,
    }
    sizes |= {"dtype": x.dtype, "parameters": weight.dtype}
    check_once("causal_conv1d", sizes, x.device, compare, rounding(x.dtype))


@operator("causal_conv1d_triton")
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    unit: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if is_due(x):
        check(x, weight, bias, silu, initial is not None, cu_seqlens is not None, unit)
    return convolve(x, weight, bias, silu, initial, cu_seqlens, unit)


@_forward.register_fake
def _(x, weight, bias, silu, initial, cu_seqlens, unit):
    B, T, D = x.shape
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(B, T, D), x.new_empty(S, weight.shape[1] - 1, D)


@operator("causal_conv1d_triton_backward")
def _backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    unit: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return convolve_backward(grad_y, grad_final, x, weight, bias, silu, initial, cu_seqlens, unit)


@_backward.register_fake
def _(grad_y, grad_final, x, weight, bias, silu, initial, cu_seqlens, unit):
    shares = x.new_empty(weight.shape[1] + 1, x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), shares, x.new_empty(0 if initial is None else initial.shape)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.silu, initial, cu_seqlens, ctx.unit = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial, cu_seqlens)


def _gradient(ctx, grad_y, grad_final):
    x, weight, bias, initial, cu_seqlens = ctx.saved_tensors
    grad_y = x.new_zeros(x.shape) if grad_y is None else grad_y
    grad_final = None if grad_final is None else grad_final.contiguous()
    rest = ctx.silu, initial, cu_seqlens, ctx.unit
    grad_x, shares, grad_initial = _backward(grad_y, grad_final, x, weight, bias, *rest)
    grad_weight, grad_bias = shares.split([weight.shape[1], 1])
    return (
        grad_x,
        grad_weight.T.to(weight.dtype),
        None if bias is None else grad_bias[0].to(bias.dtype),
        None,
        None if initial is None else grad_initial,
        None,
        None,
    )


_forward.register_autograd(_gradient, setup_context=_setup_context)


def causal_conv1d_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    unit: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.causal_conv1d.causal_conv1d`; `initial_state` has the dtype of `x`.

    The values of `cu_seqlens` are not checked: the host does not wait for them.
    """
    bias = None if bias is None else bias.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens describes documents packed into one row: expected batch size 1, got {x.shape[0]}"
            )
        cu_seqlens = cu_seqlens.to(x.device).contiguous()
    return _forward(x, weight.contiguous(), bias, silu, initial_state, cu_seqlens, unit)
