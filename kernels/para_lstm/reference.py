"""ParaLSTM one step at a time: the definition the other backends are tested against, and the decoding step."""

import itertools

import torch

from riverrun.kernels.common.chunks import sequence_bounds


def para_lstm_step(
    c: torch.Tensor, h: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor, peephole: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """c, h (B, D), gates (B, 3, D), weight (3, D), peephole (2, D) → the next c, h."""
    (a_f, a_o, a_c), (c_f, c_o) = weight, peephole
    u_f, u_o, u_c = gates.unbind(1)
    f = torch.sigmoid(a_f * h + c_f * c + u_f)
    c = f * c + (1 - f) * torch.tanh(a_c * h + u_c)
    o = torch.sigmoid(a_o * h + c_o * c + u_o)  # sees the new c
    return c, o * torch.tanh(c)


def para_lstm_reference(
    gates: torch.Tensor,
    weight: torch.Tensor,
    peephole: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.para_lstm.para_lstm` as a loop over tokens, one sequence (or batch of rows) after the other."""
    if cu_seqlens is None:
        return _recurrence(gates, weight, peephole, initial_state)
    outs, states = [], []
    for s, (start, end) in enumerate(itertools.pairwise(sequence_bounds(gates, cu_seqlens).tolist())):
        out, state = _recurrence(gates[:, start:end], weight, peephole, initial_state[s : s + 1])
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), torch.cat(states)


def _recurrence(
    gates: torch.Tensor, weight: torch.Tensor, peephole: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, peephole = weight.to(state.dtype), peephole.to(state.dtype)
    (c, h), out = state.unbind(1), []
    for gates_t in gates.to(state.dtype).unbind(1):
        c, h = para_lstm_step(c, h, gates_t, weight, peephole)
        out.append(h)
    return torch.stack(out, dim=1).to(gates.dtype), torch.stack([c, h], dim=1)
