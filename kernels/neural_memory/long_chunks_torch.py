"""The passes of `long_chunks_walk.py` in plain torch, for CPUs and float64; `triton_long_chunks.py` has the same.

N = B · H memories. A chunk is `size` tokens from `start` on: as many rows of each memory, or r where they are of keys
and of queries after them, or of queries alone. Tensors of all tokens are (B, T, H, …); gates are (layers, P, B, T, H),
or (layers, 1 or 3, B, chunks, H) at chunks' ends. The arguments that are written to come last, but for options.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from riverrun.kernels.neural_memory.gated import activate, curve, slope


class Passes(NamedTuple):
    """Every pass, by the name of its function here."""

    gather: Callable[..., None]
    spread: Callable[..., None]
    hidden: Callable[..., None]
    hidden_back: Callable[..., None]
    errors: Callable[..., None]
    errors_back: Callable[..., None]
    gradients: Callable[..., None]
    gradients_back: Callable[..., None]
    blocks: Callable[..., int]
    step: Callable[..., None]
    step_back: Callable[..., None]


def gather(of_tokens: Sequence[torch.Tensor], start: int, rows: torch.Tensor) -> None:
    """One or two (B, T, H, D) → their rows (N, r, D), one after the other."""
    for x, part in zip(of_tokens, rows.chunk(len(of_tokens), 1)):
        _by_heads(part, x).copy_(x[:, start : start + part.shape[1]])


def spread(rows: torch.Tensor, start: int, of_tokens: Sequence[torch.Tensor], sign: int = 1) -> None:
    """The inverse, by `sign`."""
    for x, part in zip(of_tokens, rows.chunk(len(of_tokens), 1)):
        torch.mul(_by_heads(part, x), sign, out=x[:, start : start + part.shape[1]])


def hidden(ac: torch.Tensor, h: torch.Tensor, silu: bool) -> None:
    """h = φ(a) ∘ c (N, r, F), of (N, r, 2 F)."""
    a, c = _wide(ac).chunk(2, -1)
    h.copy_(activate(a, _name(silu)) * c)


def errors(
    y: torch.Tensor,
    v: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    e: torch.Tensor,
    o: torch.Tensor,
    weighted: torch.Tensor,
) -> None:
    """What the memory says, y (N, r, V), minus the values: e (N, size, V), or their negative if it is of queries alone;
    o (B, T, H, V); and e by G and by N: (N, size, P, V)."""
    size, values = e.shape[1], _by_heads(e, v)
    tokens = slice(start, start + size)
    said = _wide(_by_heads(y[:, :size], v)) if y.shape[1] > size else 0
    values.copy_(said - _wide(v[:, tokens]))
    o[:, tokens] = _by_heads(y[:, -size:], v)
    _weigh(_wide(e)[:, :, None], _of_tokens(writes, start, size), weighted)


def gradients(
    dh: torch.Tensor, ac: torch.Tensor, writes: torch.Tensor, start: int, weighted: torch.Tensor, silu: bool
) -> None:
    """∂a and ∂c, by G and by N: (N, size, P, 2, F)."""
    _weigh(_of_gate(dh, ac, silu), _of_tokens(writes, start, dh.shape[1]), weighted)


def gradients_back(
    dh: torch.Tensor,
    ac: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_dh: torch.Tensor,
    by_ac: torch.Tensor,
    h: torch.Tensor,
    silu: bool,
) -> None:
    """`gradients` again, and the gradients of ∂h, of the keys' a and c as far as ∂a and ∂c depend on them, and of the
    gates; and the keys' h. through (N, size, P, 2, F) = [k Ā | k S̄], or k Ā alone: then S̄ is 0, and N plays no part."""
    by_a, by_c = _weigh_back(_of_gate(dh, ac, silu), through, writes, start, by_writes, weighted).unbind(2)
    size, dh, name = dh.shape[1], _wide(dh), _name(silu)
    a, c = _wide(ac[:, :size]).chunk(2, -1)
    by_dh.copy_(by_a * c * slope(a, name) + by_c * activate(a, name))
    of_a = dh * (by_a * c * curve(a, name) + by_c * slope(a, name))
    by_ac[:, :size] = torch.cat([of_a, dh * by_a * slope(a, name)], -1).to(by_ac.dtype)
    h[:, :size] = (activate(a, name) * c).to(h.dtype)


def errors_back(
    e: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
    by_e: torch.Tensor,
) -> None:
    """e by the gates again, and the gradients of e, in the first of its rows, and of the gates; through (N, size, P, V)
    = [h Ā | h S̄], or h Ā."""
    made = _weigh_back(_wide(e)[:, :, None], through, writes, start, by_writes, weighted)
    by_e[:, : e.shape[1]] = made.squeeze(2).to(by_e.dtype)


def hidden_back(
    by_h: torch.Tensor, ac: torch.Tensor, by_ac: torch.Tensor, h: torch.Tensor, known: int, silu: bool
) -> None:
    """Adds to the gradients of a and c in the first `known` rows, and sets them in the others, with their h."""
    (a, c), by_h, name = _wide(ac[:, -h.shape[1] :]).chunk(2, -1), _wide(by_h), _name(silu)
    made = torch.cat([by_h * c * slope(a, name), by_h * activate(a, name)], -1)
    made[:, :known] += by_ac[:, :known]
    by_ac.copy_(made)
    h[:, known:] = (activate(a, name) * c)[:, known:].to(h.dtype)


def blocks(state: torch.Tensor) -> int:
    """The parts that `step_back` makes of a sum over a state."""
    return 1


def step(
    state: torch.Tensor,
    written: torch.Tensor,
    ends: torch.Tensor,
    chunk: int,
    after: torch.Tensor,
    narrow: torch.Tensor | None,
) -> None:
    """A' and S' (N, in, P, layers, out), and A' for products (N, in, layers, out); `after` may be `state`, which may be
    (H, …) that all sequences share."""
    state, written, ends = _of_all(state, len(after)), written.view(after.shape), _of_ends(ends, chunk)
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
    chunk: int,
    by_weights: torch.Tensor,
    adjoint: torch.Tensor,
    before: torch.Tensor,
    narrow: torch.Tensor | None,
    sums: torch.Tensor,
    live: int,
) -> None:
    """From the gradients of A' and S', `adjoint`, those of A and S, `before`, which may be the same tensor, with those
    of W added; sums of what all sequences share. `narrow` has them for products. Parts of `sums` (layers, 1 or 3, B,
    chunks, H, blocks) are the gradients of the gates. Of A' and S' the first `live` have gradients; where `narrow` goes
    on from none, that of S need not be written."""
    made, P = torch.zeros_like(adjoint), adjoint.shape[2]
    made[:, :, 0] = by_weights.view(made[:, :, 0].shape)
    of, all_states = _of_ends(ends, chunk), _of_all(state, len(adjoint))
    for i, j in [(0, 0), (0, 1), (1, 1)][: 2 * P - 1]:  # A by β A' and, with a momentum, S by f A' and by m S'
        if i < live:
            made[:, :, j] += of[i + j] * adjoint[:, :, i]
            found = (adjoint[:, :, i] * all_states[:, :, j]).sum((1, 3))  # (N, layers)
            into = sums[:, i + j, :, chunk, :, 0]
            into.copy_(found.T.view(into.shape))
    before.copy_(made.view(-1, *before.shape).sum(0))
    if narrow is not None:
        narrow.copy_(made)


def _of_gate(dh: torch.Tensor, ac: torch.Tensor, silu: bool) -> torch.Tensor:
    """The keys' ∂a and ∂c (N, size, 2, F)."""
    (a, c), dh = _wide(ac[:, : dh.shape[1]]).chunk(2, -1), _wide(dh)
    return torch.stack([dh * c * slope(a, _name(silu)), dh * activate(a, _name(silu))], 2)


def _weigh(x: torch.Tensor, of: torch.Tensor, weighted: torch.Tensor) -> None:
    """x (N, size, layers, out), by `_of_tokens` → (N, size, P, layers, out)."""
    weighted.copy_((x[:, :, None] * of).flatten(2))


def _weigh_back(
    x: torch.Tensor,
    through: torch.Tensor,
    writes: torch.Tensor,
    start: int,
    by_writes: torch.Tensor,
    weighted: torch.Tensor,
) -> torch.Tensor:
    """→ the gradient of x."""
    size, (L, _, B, _, H) = x.shape[1], by_writes.shape
    through = _wide(through).view(*x.shape[:2], -1, *x.shape[2:])
    P = through.shape[2]
    of = _of_tokens(writes[:, :P], start, size)
    _weigh(x, of, weighted)
    sums = -(through * x[:, :, None]).sum(-1)  # (N, size, P, layers)
    by_writes[:, :P, :, start : start + size] = sums.view(B, H, size, P, L).permute(4, 3, 0, 2, 1)
    return -(of * through).sum(2)


def _of_tokens(writes: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """(layers, P, B, T, H) → (N, size, P, layers, 1) of a chunk."""
    return writes[:, :, :, start : start + size].permute(2, 4, 3, 1, 0).flatten(0, 1)[..., None]


def _of_ends(ends: torch.Tensor, chunk: int) -> torch.Tensor:
    """(layers, 1 or 3, B, chunks, H) → (1 or 3, N, 1, layers, 1)."""
    return ends[:, :, :, chunk].permute(1, 2, 3, 0).flatten(1, 2)[:, :, None, :, None]


def _of_all(state: torch.Tensor, N: int) -> torch.Tensor:
    """(N or H, …) → (N, …)."""
    return state.expand(N // len(state), *state.shape).flatten(0, 1)


def _by_heads(rows: torch.Tensor, of_tokens: torch.Tensor) -> torch.Tensor:
    """(N, size, D) → (B, size, H, D)."""
    return rows.unflatten(0, (len(of_tokens), -1)).transpose(1, 2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _name(silu: bool) -> str:
    return "silu" if silu else "gelu"


IN_TORCH = Passes(
    gather, spread, hidden, hidden_back, errors, errors_back, gradients, gradients_back, blocks, step, step_back
)
