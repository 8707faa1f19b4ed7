"""The recurrence one time step at a time: the definition, and the decoding step."""

import itertools

import torch

from riverrun.kernels.common.chunks import sequence_bounds


def diagonal_scan_reference(
    x: torch.Tensor, a: torch.Tensor, initial_state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.diagonal_scan.diagonal_scan` of tensors that are all of the state's dtype."""
    a = a.expand_as(x)
    if cu_seqlens is None:
        return _steps(x, a, initial_state)
    hs, states = [], []
    for s, (start, end) in enumerate(itertools.pairwise(sequence_bounds(x, cu_seqlens).tolist())):
        h, state = _steps(x[:, start:end], a[:, start:end], initial_state[s : s + 1])
        hs.append(h)
        states.append(state)
    return torch.cat(hs, dim=1), torch.cat(states)


def _steps(x: torch.Tensor, a: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hs = []
    for x_t, a_t in zip(x.unbind(1), a.unbind(1)):
        h = a_t * h + x_t
        hs.append(h)
    return torch.stack(hs, dim=1), h
