"""Small layers that several mixers use."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.modeling.layout import Layout
from riverrun.modeling.parallel.conv import with_inputs_before
from riverrun.modeling.projection import project


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, with a weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ShortConv(nn.Module):
    """Depthwise causal convolution over time, followed by SiLU, and scaled to unit length by every `unit` channels if
    that is given. Called by `short_convs`."""

    def __init__(self, dim: int, kernel: int, bias: bool, unit: int | None = None):
        super().__init__()
        self.taps, self.unit = kernel, unit
        self.weight = nn.Parameter(torch.empty(dim, kernel))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])  # fan-in of a depthwise convolution
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor, initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None):
        """x (B, T, dim), and the inputs before each sequence (S, taps − 1, dim) → the same, and the last inputs."""
        return causal_conv1d(
            x, self.weight, self.bias, activation="silu", unit=self.unit, initial_state=initial, cu_seqlens=cu_seqlens
        )  # fmt: skip


def short_convs(
    layout: Layout, states: dict[str, torch.Tensor] | None, **convs: tuple[ShortConv, torch.Tensor]
) -> list[torch.Tensor]:
    """Convolutions of one mixer, each of its own input (B, T, dim), flattened if packed; they read and write the last
    inputs `states[name]` (B, taps − 1, dim). All have equally many taps."""
    if layout.context is not None:
        taps = {conv.taps for conv, _ in convs.values()}
        inputs = with_inputs_before(layout.context, [x for _, x in convs.values()], *taps)
        bounds = layout.context.cu_seqlens
        return [conv(x, before, bounds)[0] for (conv, _), (x, before) in zip(convs.values(), inputs)]
    outputs = []
    for name, (conv, x) in convs.items():
        y, tail = conv(x, layout.initial(states, name), layout.cu_seqlens)
        if states is not None:
            states[name] = layout.last(tail)
        outputs.append(y)
    return outputs


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


def init_decay(A_log: nn.Parameter, dt_bias: nn.Parameter, A_min, A_max, dt_min, dt_max, dt_floor) -> None:
    """Mamba-2's start: A uniform, dt log-uniform (with a floor), dt_bias its inverse softplus."""
    with torch.no_grad():
        A_log.uniform_(A_min, A_max).log_()
        dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max)).exp_()
        dt.clamp_(min=dt_floor)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """To fp32 from a narrower type: decays and gates near one lose too much in bf16. fp64 stays, for exact tests."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fp32_parameter(*shape: int) -> nn.Parameter:
    """A small recurrence parameter: kept in fp32 under bf16 training, and without weight decay."""
    param = nn.Parameter(torch.empty(*shape, dtype=torch.float32))
    param.keep_fp32 = True  # type: ignore[attr-defined]
    param.no_weight_decay = True  # type: ignore[attr-defined]
    return param
