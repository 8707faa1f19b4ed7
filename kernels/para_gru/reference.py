"""ParaGRU one step at a time: the definition the other backends are tested against, and the decoding step."""

import itertools

import torch

from riverrun.kernels.common.chunks import sequence_bounds


def para_gru_step(h: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """h (B, D), gates (B, 3, D), weight (3, D) → the next h."""
    a_z, a_r, a_n = weight
    u_z, u_r, u_n = gates.unbind(1)
    z = torch.sigmoid(a_z * h + u_z)
    r = torch.sigmoid(a_r * h + u_r)
    n = torch.tanh(a_n * (r * h) + u_n)
    return (1 - z) * h + z * n


def para_gru_reference(
    gates: torch.Tensor, weight: torch.Tensor, initial_state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.para_gru.para_gru` as a loop over tokens, one sequence (or batch of rows) after the other."""
    if cu_seqlens is None:
        return _recurrence(gates, weight, initial_state)
    outs, states = [], []
    for s, (start, end) in enumerate(itertools.pairwise(sequence_bounds(gates, cu_seqlens).tolist())):
        out, state = _recurrence(gates[:, start:end], weight, initial_state[s : s + 1])
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), torch.cat(states)


def _recurrence(gates: torch.Tensor, weight: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = []
    for gates_t in gates.to(h.dtype).unbind(1):
        h = para_gru_step(h, gates_t, weight.to(h.dtype))
        out.append(h)
    return torch.stack(out, dim=1).to(gates.dtype), h
