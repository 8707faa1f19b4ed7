"""When a token has had enough iterations (Geiping et al. 2025, arXiv 2502.05171, §6.1).

    kl        KL(p_i ‖ p_{i−1}) < 5e-4, of successive output distributions
    latent    ‖s_i − s_{i−1}‖ / ‖s_i‖ < 0.03
    argmax    the likeliest token has been the same for 5 iterations after one

The thresholds are the paper's for kl, and those of its authors' code for the others. kl and argmax look at the coda's
output at every iteration, which costs the coda and the head each time.
"""

from abc import ABC, abstractmethod

import torch


class Exit(ABC):
    """Sees the iterations of one token of each row, in order."""

    sees_logits: bool

    def __init__(self, threshold: float):
        self.threshold = threshold

    @abstractmethod
    def __call__(self, before: torch.Tensor, s: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Whether each row's token is done, (B,) bool.

        Args:
            before, s: (B, 1, h) s_{i−1} and s_i.
            logits: (B, V) of s_i; None unless `sees_logits`.
        """


class KL(Exit):
    sees_logits = True
    log_p: torch.Tensor | None = None

    def __call__(self, before: torch.Tensor, s: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        assert logits is not None
        old, self.log_p = self.log_p, _log_probabilities(logits)
        if old is None:
            return torch.zeros(len(s), dtype=torch.bool, device=s.device)
        return (self.log_p.exp() * (self.log_p - old)).sum(-1) < self.threshold


class Latent(Exit):
    sees_logits = False

    def __call__(self, before: torch.Tensor, s: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        return relative_change(before, s)[:, 0] < self.threshold


class Argmax(Exit):
    sees_logits = True
    token: torch.Tensor | None = None
    stable: torch.Tensor | int = 0

    def __call__(self, before: torch.Tensor, s: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        assert logits is not None
        old, self.token = self.token, logits.argmax(-1)
        if old is None:
            return torch.zeros(len(s), dtype=torch.bool, device=s.device)
        self.stable = torch.where(self.token == old, self.stable + 1, 0)
        return self.stable >= self.threshold


EXITS: dict[str, tuple[type[Exit], float]] = {"kl": (KL, 5e-4), "latent": (Latent, 0.03), "argmax": (Argmax, 5)}


def relative_change(before: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """‖s − before‖ / ‖s‖ of each token, (B, W, h) twice → (B, W), at least fp32."""
    wide = torch.promote_types(s.dtype, torch.float32)
    return (s.to(wide) - before.to(wide)).norm(dim=-1) / s.to(wide).norm(dim=-1)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
