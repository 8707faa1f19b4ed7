"""The convolution one time step at a time: the definition, and the decoding step."""

import itertools

import torch

from riverrun.kernels.common.chunks import sequence_bounds

UNIT_EPS = 1e-6  # of squared lengths


def to_unit(y: torch.Tensor, size: int) -> torch.Tensor:
    """y (…, D) with every `size` neighbouring channels scaled to unit length, y / √(Σ y² + 1e-6)."""
    heads = y.unflatten(-1, (-1, size))
    return (heads * (heads.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()).flatten(-2)


def causal_conv1d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.causal_conv1d.causal_conv1d` before the activation, y in float32 or float64."""
    if cu_seqlens is None:
        return _steps(x, weight, bias, initial_state)
    ys, states = [], []
    for s, (start, end) in enumerate(itertools.pairwise(sequence_bounds(x, cu_seqlens).tolist())):
        y, state = _steps(x[:, start:end], weight, bias, initial_state[s : s + 1])
        ys.append(y)
        states.append(state)
    return torch.cat(ys, dim=1), torch.cat(states)


def _steps(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = bias + Σ_w weight[:, w] · window_t[w], where the window holds the last W inputs, newest last."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    taps = weight.T.to(dtype)
    out = []
    for x_t in x.unbind(1):
        window = torch.cat([window, x_t[:, None]], dim=1)  # (B, W, D)
        y_t = (window.to(dtype) * taps).sum(1)
        out.append(y_t if bias is None else y_t + bias.to(dtype))
        window = window[:, 1:]
    return torch.stack(out, dim=1), window
