"""The passes of `long_chunks_walk.py` in plain torch, for CPUs and float64; `triton_long_chunks.py` has the same.

N = B · H memories; tokens of a chunk are rows r, b of them. Gates are (layers, P, B, b, H), or (layers, 1 or 3, B, H)
at a chunk's end. The arguments that are written to come last, but for options.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from riverrun.kernels.neural_memory.gated import activate, curve, slope


class Passes(NamedTuple):
    """Every pass, by the name of its function here."""

    move: Callable[..., None]
    hidden: Callable[..., None]
    hidden_back: Callable[..., None]
    gradients: Callable[..., None]
    gradients_back: Callable[..., None]
    errors: Callable[..., None]
    errors_back: Callable[..., None]
    step: Callable[..., None]
    step_back: Callable[..., None]


def move(source: torch.Tensor, target: torch.Tensor, sign: int = 1) -> None:
    """(B, b, H, D), each in an order of its own in memory."""
    torch.mul(source, sign, out=target) if sign != 1 else target.copy_(source)


def hidden(ac: torch.Tensor, h: torch.Tensor, silu: bool) -> None:
    """h = φ(a) ∘ c (N, r, F), of (N, r, 2 F)."""
    a, c = _wide(ac).chunk(2, -1)
    h.copy_(activate(a, _name(silu)) * c)


def gradients(dh: torch.Tensor, ac: torch.Tensor, writes: torch.Tensor, weighted: torch.Tensor, silu: bool) -> None:
    """∂a and ∂c, by G and by N: (N, b, P, 2, F)."""
    _weigh(_of_gate(dh, ac, silu), writes, weighted)


def errors(e: torch.Tensor, writes: torch.Tensor, weighted: torch.Tensor) -> None:
    """e by G and by N: (N, b, P, V)."""
    _weigh(_wide(e)[:, :, None], writes, weighted)


def errors_back(
    e: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_e: torch.Tensor,
) -> None:
    """`errors` again, and the gradients of e and of the gates; through (N, b, P, V) = [h Ā | h S̄]."""
    by_e.copy_(_weigh_back(_wide(e)[:, :, None], through, writes, by_writes, weighted).squeeze(2))


def gradients_back(
    dh: torch.Tensor,
    ac: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_dh: torch.Tensor,
    by_ac: torch.Tensor,
    silu: bool,
) -> None:
    """`gradients` again, and the gradients of ∂h, of a and c as far as ∂a and ∂c depend on them, and of the gates;
    through (N, b, P, 2, F) = [k Ā | k S̄]."""
    by_a, by_c = _weigh_back(_of_gate(dh, ac, silu), through, writes, by_writes, weighted).unbind(2)
    (a, c), dh, name = _wide(ac).chunk(2, -1), _wide(dh), _name(silu)
    by_dh.copy_(by_a * c * slope(a, name) + by_c * activate(a, name))
    of_a = dh * (by_a * c * curve(a, name) + by_c * slope(a, name))
    by_ac.copy_(torch.cat([of_a, dh * by_a * slope(a, name)], -1))


def hidden_back(
    by_h: torch.Tensor, ac: torch.Tensor, by_ac: torch.Tensor, h: torch.Tensor, known: int, silu: bool
) -> None:
    """Adds to the gradients of a and c in the first `known` rows, and sets them in the others, with their h."""
    (a, c), by_h, name = _wide(ac).chunk(2, -1), _wide(by_h), _name(silu)
    made = torch.cat([by_h * c * slope(a, name), by_h * activate(a, name)], -1)
    made[:, :known] += by_ac[:, :known]
    by_ac.copy_(made)
    h[:, known:] = (activate(a, name) * c)[:, known:].to(h.dtype)


def step(
    state: torch.Tensor, written: torch.Tensor, ends: torch.Tensor, after: torch.Tensor, narrow: torch.Tensor | None
) -> None:
    """A' and S' (N, in, P, layers, out), and A' for products (N, in, layers, out); `after` may be `state`."""
    written, ends = written.view(state.shape), _of_ends(ends)
    kept = ends[0] * state[:, :, 0]
    if len(ends) == 3:
        kept = kept + ends[1] * state[:, :, 1]
        after[:, :, 1] = ends[2] * state[:, :, 1] - written[:, :, 1]
    after[:, :, 0] = kept - written[:, :, 0]
    if narrow is not None:
        narrow.copy_(after[:, :, 0].flatten(2))


def step_back(
    state: torch.Tensor,
    ends: torch.Tensor,
    by_weights: torch.Tensor,
    adjoint: torch.Tensor,
    narrow: torch.Tensor | None,
    by_ends: torch.Tensor | None,
) -> None:
    """The gradients of A' and S' become those of A and S, to which those of W are added; `narrow` has them for
    products. Without `by_ends` there were none."""
    by_weights = by_weights.view(adjoint[:, :, 0].shape)
    if by_ends is None:
        adjoint[:, :, 0] = by_weights
        adjoint[:, :, 1:] = 0
    else:
        of, P = _of_ends(ends), state.shape[2]
        pairs = [(0, 0), (0, 1), (1, 1)][: 1 if P == 1 else 3]
        sums = [(adjoint[:, :, i] * state[:, :, j]).sum((1, 3)) for i, j in pairs]  # (N, layers)
        by_ends.copy_(torch.stack(sums).permute(2, 0, 1).view(by_ends.shape))
        if P == 2:
            adjoint[:, :, 1] = of[1] * adjoint[:, :, 0] + of[2] * adjoint[:, :, 1]
        adjoint[:, :, 0] = of[0] * adjoint[:, :, 0] + by_weights
    if narrow is not None:
        narrow.copy_(adjoint)


def _of_gate(dh: torch.Tensor, ac: torch.Tensor, silu: bool) -> torch.Tensor:
    """∂a and ∂c (N, b, 2, F)."""
    (a, c), dh = _wide(ac).chunk(2, -1), _wide(dh)
    return torch.stack([dh * c * slope(a, _name(silu)), dh * activate(a, _name(silu))], 2)


def _weigh(x: torch.Tensor, writes: torch.Tensor, weighted: torch.Tensor) -> None:
    """x (N, b, layers, out) → (N, b, P, layers, out)."""
    weighted.copy_((x[:, :, None] * _of_tokens(writes)).flatten(2))


def _weigh_back(
    x: torch.Tensor, through: torch.Tensor, writes: torch.Tensor, by_writes: torch.Tensor, weighted: torch.Tensor
) -> torch.Tensor:
    """→ the gradient of x."""
    of = _of_tokens(writes)
    _weigh(x, writes, weighted)
    through = _wide(through).view(*x.shape[:2], -1, *x.shape[2:])
    sums = -(through * x[:, :, None]).sum(-1)  # (N, b, P, layers)
    L, P, B, b, H = by_writes.shape
    by_writes.copy_(sums.view(B, H, b, P, L).permute(4, 3, 0, 2, 1))
    return -(of * through).sum(2)


def _of_tokens(writes: torch.Tensor) -> torch.Tensor:
    """(layers, P, B, b, H) → (N, b, P, layers, 1)."""
    return writes.permute(2, 4, 3, 1, 0).flatten(0, 1)[..., None]


def _of_ends(ends: torch.Tensor) -> torch.Tensor:
    """(layers, 1 or 3, B, H) → (1 or 3, N, 1, layers, 1)."""
    return ends.permute(1, 2, 3, 0).flatten(1, 2)[:, :, None, :, None]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _name(silu: bool) -> str:
    return "silu" if silu else "gelu"


IN_TORCH = Passes(move, hidden, hidden_back, gradients, gradients_back, errors, errors_back, step, step_back)
