"""Any cell one step at a time, recorded by autograd: the definition the solver is tested against, and decoding."""

import itertools
from collections.abc import Callable

import torch

from riverrun.kernels.common.chunks import sequence_bounds


def parallel_rnn_reference(
    step: Callable,
    gates: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """gates (B, T, G, D), weight (P, D), initial_state (S, K, D) → states (K, B, T, D), in the type of the latter."""
    gates, weight = gates.to(initial_state.dtype), weight.to(initial_state.dtype)
    if cu_seqlens is None:
        return _recurrence(step, gates, weight, initial_state)
    bounds = itertools.pairwise(sequence_bounds(gates, cu_seqlens).tolist())
    documents = [
        _recurrence(step, gates[:, start:end], weight, initial_state[s : s + 1])
        for s, (start, end) in enumerate(bounds)
    ]
    return torch.cat(documents, dim=2)


def _recurrence(step: Callable, gates: torch.Tensor, weight: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    state, out = initial.unbind(1), []
    for gates_t in gates.unbind(1):
        state = tuple(step(state, gates_t, weight))
        out.append(torch.stack(state))
    return torch.stack(out, dim=2)
