"""`head_rnn` one step at a time, through autograd: the definition that the other backends are tested against."""

import itertools

import torch

from riverrun.kernels.common.chunks import sequence_bounds
from riverrun.kernels.head_rnn.cells import Cell


def head_rnn_reference(
    gates: torch.Tensor, weight: torch.Tensor, cell: Cell, initial_state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.head_rnn.head_rnn` as a loop over tokens, one sequence (or batch of rows) after the other."""
    if cu_seqlens is None:
        return _recurrence(gates, weight, cell, initial_state)
    outs, states = [], []
    for s, (start, end) in enumerate(itertools.pairwise(sequence_bounds(gates, cu_seqlens).tolist())):
        out, state = _recurrence(gates[:, start:end], weight, cell, initial_state[s : s + 1])
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), torch.cat(states)


def _recurrence(
    gates: torch.Tensor, weight: torch.Tensor, cell: Cell, initial_state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    state, out = initial_state.unbind(1), []
    weight = weight.to(initial_state.dtype)
    for u in gates.to(initial_state.dtype).unbind(1):  # (B, G, H, K)
        rec = torch.einsum("bhk,ghkj->gbhj", state[-1], weight)
        state = cell.step(state, u.unbind(1), rec.unbind(0))
        out.append(state[-1])
    return torch.stack(out, dim=1).to(gates.dtype), torch.stack(state, dim=1)
