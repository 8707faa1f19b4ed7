"""What Titans' blocks share in attention: positions that go on over calls, and attention in a sliding window beside
persistent keys, with a cache of one size.

States hold how many tokens of a row's running sequence there were, `memory_seen` (B,): by that, and by where a key lies
in the cache, it is known which keys there are. A row whose states are zeros begins anew.
"""

import torch

from riverrun.modeling.layout import Layout
from riverrun.modeling.parallel.attention import context_attention
from riverrun.modeling.persistent_attention import masked_persistent_attention, persistent_attention

States = dict[str, torch.Tensor]


def running_positions(layout: Layout, states: States | None) -> torch.Tensor:
    """(B, T) int64, of each token in its sequence, those before the call counted: of states that training starts from,
    a layout does not know."""
    if states is None or "memory_seen" not in states:
        return layout.positions
    before = states["memory_seen"].long()[:, None] - layout.positions[:, :1]
    if layout.sequence is not None:
        before = torch.where(layout.sequence == layout.sequence[:, :1], before, 0)
    return layout.positions + before


def note_positions(states: States, positions: torch.Tensor) -> None:
    """In fp32, as training keeps all states; it is exact up to 2²⁴ tokens."""
    states["memory_seen"] = positions[:, -1].float() + 1


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    persistent_k: torch.Tensor | None,
    persistent_v: torch.Tensor | None,
    window: int,
    positions: torch.Tensor,
    layout: Layout,
    states: States | None,
) -> torch.Tensor:
    """Of tokens to themselves and to those before the call, whose keys and values `states` holds: always window − 1 of
    them, (B, H, window − 1, d), zeros where there were none.

    Args:
        q, k, v: (B, H, T, d), turned by their `running_positions` (B, T).
        persistent_k, persistent_v: (H, P, d), or None.
        window: tokens that a query sees, itself included.

    Returns:
        (B, H, T, d)
    """
    if layout.context is not None:
        return context_attention(layout, q, k, v, window, persistent_k, persistent_v)
    T, keep = q.shape[2], window - 1
    if states is None:
        return persistent_attention(q, k, v, persistent_k, persistent_v, window, layout.cu_seqlens, T)
    near = min(T, keep) if "k" in states else 0  # queries that see tokens before the call
    past = [_before(states, name, new, keep) for name, new in (("k", k), ("v", v))]
    parts = []
    if near:
        mask = _mask(layout, states["memory_seen"].long(), window, near)
        keys, values = (torch.cat([old, new[:, :, :near]], dim=2) for old, new in zip(past, (k, v)))
        parts.append(masked_persistent_attention(q[:, :, :near], keys, values, persistent_k, persistent_v, mask))
    if near < T:
        y = persistent_attention(q, k, v, persistent_k, persistent_v, window, layout.cu_seqlens, T)
        parts.append(y[:, :, near:])
    note_positions(states, positions)
    there = torch.arange(-keep, 0, device=q.device) >= -states["memory_seen"].long()[:, None]  # (B, keep)
    for name, old, new in zip("kv", past, (k, v)):
        states[name] = torch.where(there[:, None, :, None], torch.cat([old, new], dim=2)[:, :, T:], 0)
    return torch.cat(parts, dim=2)


def _before(states: States, name: str, new: torch.Tensor, keep: int) -> torch.Tensor:
    """(B, H, keep, d), like `new` (B, H, T, d)."""
    return states[name].to(new.dtype) if name in states else new.new_zeros(*new.shape[:2], keep, new.shape[3])


def _mask(layout: Layout, seen: torch.Tensor, window: int, near: int) -> torch.Tensor:
    """(B, 1, near, window − 1 + near) bool: which of the cached tokens and the first new ones those see."""
    device = seen.device
    query = torch.arange(near, device=device)[:, None]
    key = torch.arange(1 - window, near, device=device)  # the first new token is 0
    mask = (key <= query) & (query - key < window) & (key >= -seen[:, None, None])  # (B, near, window − 1 + near)
    if layout.sequence is not None:
        new = layout.sequence[:, :near]
        of_keys = torch.cat([new[:, :1].expand(-1, window - 1), new], dim=1)
        mask &= new[:, :, None] == of_keys[:, None]
    return mask[:, None]
