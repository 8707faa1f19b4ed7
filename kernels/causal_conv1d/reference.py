"""The convolution one time step at a time: the definition, and the decoding step."""

import torch


def causal_conv1d_reference(
    x: torch.Tensor, weight: torch.Tensor, initial_state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = Σ_w weight[:, w] · window_t[w], where the window holds the last W inputs of the sequence, newest last."""
    if cu_seqlens is None:
        return _steps(x, weight, initial_state)
    ys, states = [], []
    bounds = cu_seqlens.tolist()
    for s in range(len(bounds) - 1):
        y, state = _steps(x[:, bounds[s] : bounds[s + 1]], weight, initial_state[s : s + 1])
        ys.append(y)
        states.append(state)
    return torch.cat(ys, dim=1), torch.cat(states)


def _steps(x: torch.Tensor, weight: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = []
    for x_t in x.unbind(1):
        window = torch.cat([window, x_t[:, None]], dim=1)  # (B, W, D)
        out.append((window * weight.T).sum(1))
        window = window[:, 1:]
    return torch.stack(out, dim=1), window
