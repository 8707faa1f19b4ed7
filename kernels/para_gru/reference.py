"""ParaGRU one step at a time: the definition the other backends are tested against."""

import torch

from riverrun.kernels.common.chunks import sequence_bounds


def para_gru_step(h: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One step; h (…, D), gates (…, 3, D) pre-activations z, r, n, weight (3, D). ParaRNN (arXiv 2510.21450), §4."""
    a_z, a_r, a_n = weight
    u_z, u_r, u_n = gates.unbind(-2)
    z = torch.sigmoid(a_z * h + u_z)
    r = torch.sigmoid(a_r * h + u_r)
    n = torch.tanh(a_n * (r * h) + u_n)
    return (1 - z) * h + z * n


def para_gru_reference(gates, weight, initial_state, cu_seqlens):
    bounds = sequence_bounds(gates, cu_seqlens).tolist()
    if cu_seqlens is None:
        h, out = initial_state, []
        for u in gates.unbind(1):
            h = para_gru_step(h, u, weight)
            out.append(h)
        return torch.stack(out, 1), h
    outs, finals = [], []
    for s in range(len(bounds) - 1):
        y, h = para_gru_reference(gates[:, bounds[s] : bounds[s + 1]], weight, initial_state[s : s + 1], None)
        outs.append(y)
        finals.append(h)
    return torch.cat(outs, 1), torch.cat(finals)
