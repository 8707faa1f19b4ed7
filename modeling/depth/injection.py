"""How every iteration of the core is given the prelude's output e again, beside its own state s.

What depends on e alone, the drive, is the same in all iterations and computed once a call. So its gradient is that of
the iterations that have one, added up.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.modeling.layers import RMSNorm, at_least_fp32, fp32_parameter
from riverrun.modeling.options import ModelOptions

DECAY = math.sqrt(1 / 5)  # Ā of a new model


class LinearInjection(nn.Linear):
    """Huginn's adapter (arXiv 2502.05171, §3): A [s; e] without a bias, A = [A_s | A_e] of (h, 2h)."""

    def __init__(self, options: ModelOptions):
        super().__init__(2 * options.hidden_size, options.hidden_size, bias=False)

    def drive(self, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A_e e, and A_s, which is cut out once too: the gradient of a part is as large as the whole."""
        of_state, of_input = self.weight.chunk(2, dim=1)
        return F.linear(e, of_input), of_state

    def forward(self, s: torch.Tensor, drive: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        """s (…, h) → A [s; e], what the core's layers get."""
        driven, of_state = drive
        return (F.linear(s, of_state) + driven).to(s.dtype)

    def read_out(self, s: torch.Tensor) -> torch.Tensor:
        """What leaves the core, of its last state."""
        return s

    def step_flops(self) -> float:
        """FLOPs a token and iteration."""
        return float(self.weight.numel())  # 2 · h · h

    def call_flops(self) -> float:
        """FLOPs a token of what is computed once a call."""
        return float(self.weight.numel())  # 2 · h · h


class DiagonalInjection(nn.Module):
    """Parcae's contracting state path (arXiv 2604.12946): Ā ⊙ s + B̄ norm(e), and C s after the last iteration.

    Ā = exp(−Δ exp(A_log)) is between 0 and 1 in every channel, B̄ = Δ B, Δ = softplus(dt_bias). A_log, dt_bias, B and C
    have no weight decay; as in the authors' code a new model has A = 1, Ā = √(1/5), and identities for B and C. There
    the coda gets C s as it is; here what leaves a core is normed, whatever its injection.
    """

    def __init__(self, options: ModelOptions):
        super().__init__()
        h = options.hidden_size
        self.A_log = fp32_parameter(h)
        self.dt_bias = fp32_parameter(h)
        self.B = _undecayed(h, h)
        self.C = _undecayed(h, h)
        self.e_norm = RMSNorm(h, options.norm_eps)

    def drive(self, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B̄ norm(e), and Ā."""
        step = F.softplus(at_least_fp32(self.dt_bias))
        decay = torch.exp(-step * at_least_fp32(self.A_log).exp())
        return (step * F.linear(self.e_norm(e), self.B)).to(e.dtype), decay

    def forward(self, s: torch.Tensor, drive: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """s (…, h) → Ā ⊙ s + B̄ e, what the core's layers get."""
        driven, decay = drive
        return (decay * s + driven).to(s.dtype)

    def read_out(self, s: torch.Tensor) -> torch.Tensor:
        """What leaves the core, of its last state."""
        return F.linear(s, self.C).to(s.dtype)

    def reset_parameters(self) -> None:
        step = -math.log(DECAY)
        nn.init.zeros_(self.A_log)
        nn.init.constant_(self.dt_bias, step + math.log(-math.expm1(-step)))  # the inverse of softplus
        nn.init.eye_(self.B)
        nn.init.eye_(self.C)

    def step_flops(self) -> float:
        """FLOPs a token and iteration, of matrices."""
        return 0.0

    def call_flops(self) -> float:
        """FLOPs a token of what is computed once a call."""
        return 2.0 * (self.B.numel() + self.C.numel())


def _undecayed(*shape: int) -> nn.Parameter:
    param = nn.Parameter(torch.empty(*shape))
    param.no_weight_decay = True  # type: ignore[attr-defined]
    return param


INJECTIONS: dict[str, type[LinearInjection | DiagonalInjection]] = {
    "linear": LinearInjection,
    "diagonal": DiagonalInjection,
}
