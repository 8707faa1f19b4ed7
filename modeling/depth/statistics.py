"""What a model's recurrence did in training since it was last asked: sums on the device, read when taken.

Means over tokens and calls, by which runs that fail are told early (Geiping et al. 2025, arXiv 2502.05171, §4.2):

    depth_change         ‖s_r − s_{r−1}‖ / ‖s_r‖ of a token: how far from a fixed point the last iteration ended
    depth_norm           ‖s_r‖ / √h
    depth_correlation    cosine between the states s_r of two tokens of a row, mean over pairs: tokens that become alike
                         (→ 1) are a bad start. Not of ranks that share rows: each has part of the tokens.
    depth_loss_low, depth_loss_mid, depth_loss_high    the loss, in nats, of micro batches with counts in the lowest,
                         middle and highest third of their distribution: equal losses mean that the state is ignored
    halting_steps, halting_remainder    N and R of a position of a Universal Transformer (`modeling.depth.halting`)
"""

import math

import torch

from riverrun.modeling.statistics import note


@torch.no_grad()
def note_iterates(before: torch.Tensor, after: torch.Tensor, rows: bool) -> None:
    """s_{r−1} and s_r, (..., h) of some tokens.

    Args:
        rows: they are (B, T, h), of whole rows.
    """
    size = _norm(after).clamp_min(1e-12)
    note("depth_change", (_norm(after - before) / size).sum(), size.numel())
    note("depth_norm", size.sum() / math.sqrt(after.shape[-1]), size.numel())
    if rows and (T := after.shape[1]) > 1:
        total = (after.float() / size[..., None]).sum(dim=1).square().sum(dim=-1)  # (B,) ‖Σ ŝ‖² = T + Σ of i ≠ j
        note("depth_correlation", ((total - T) / (T * (T - 1))).sum(), len(after))


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Over channels, in float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
