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

_sums: dict[str, list[torch.Tensor]] = {}


def take_depth_statistics() -> dict[str, list[float]]:
    """Of each name [sum, count], and start anew."""
    names = list(_sums)
    values = torch.stack([x for name in names for x in _sums[name]]).tolist() if names else []
    _sums.clear()
    return dict(zip(names, map(list, zip(values[::2], values[1::2]))))


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


def note(name: str, value: torch.Tensor, count: float) -> None:
    """A sum, on any device, of so many things."""
    if type(value) is not torch.Tensor:  # one without memory, of those who look what a model allocates
        return
    new = value.detach().double(), torch.full_like(value, count, dtype=torch.float64)
    _sums[name] = [a + b for a, b in zip(_sums[name], new)] if name in _sums else list(new)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Over channels, in float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
