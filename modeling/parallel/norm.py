"""RMSNorm over channels that lie on several tensor-parallel ranks."""

import torch
from torch.nn import functional as F

from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.modeling.parallel.collectives import all_reduce
from riverrun.modeling.parallel.mesh import Axis


def sharded_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    tp: Axis,
    *,
    eps: float,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """`gated_rms_norm` of the channels of all ranks side by side, of which x, gate (…, D) and weight (D,) are this
    rank's. `groups` blocks of the whole width are normed each; a rank's channels are whole groups or within one.

    Where a group spans ranks, its sum of squares, a number a token, is summed over them.
    """
    if groups % tp.size == 0:
        return gated_rms_norm(
            x, gate, weight, eps=eps, groups=groups // tp.size, norm_before_gate=norm_before_gate
        )  # fmt: skip
    assert tp.size % groups == 0, f"{groups} groups on {tp.size} ranks"
    dtype = torch.promote_types(x.dtype, torch.float32)
    y, gating = x.to(dtype), None if gate is None else F.silu(gate.to(dtype))
    if gating is not None and not norm_before_gate:
        y = y * gating
    mine = F.one_hot(torch.tensor(tp.rank * groups // tp.size, device=x.device), groups)
    squares = all_reduce(y.square().sum(-1, keepdim=True) * mine, tp)  # (…, groups)
    of_group = (squares * mine).sum(-1, keepdim=True)
    y = y * torch.rsqrt(of_group * groups / (x.shape[-1] * tp.size) + eps) * weight.to(dtype)
    if gating is not None and norm_before_gate:
        y = y * gating
    return y.to(x.dtype)
