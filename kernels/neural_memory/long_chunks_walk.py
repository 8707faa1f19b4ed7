"""A gated memory read at its chunks' starts, chunk after chunk: products for all sequences and heads at once, with one
pass over memory between two of them; and the way back, by hand.

With W₁ = [gate | up] and W₂ at a chunk's start, A and S the weights and their momentum there, and G, N, β, f, m of the
chunk's end (`gates.py`),

    [a | c] = k W₁    h = φ(a) ∘ c    e = h W₂ − v    ∂h = e W₂ᵀ    ∂a = ∂h ∘ c ∘ φ'(a)    ∂c = ∂h ∘ φ(a)
    A' = β A + f S − Σ_i G_i x_i δ_iᵀ    S' = m S − Σ_i N_i x_i δ_iᵀ        of x = k, δ = [∂a | ∂c] and of x = h, δ = e

With Ā and S̄ the gradients of A' and S', those of δ are −(G ∘ x Ā + N ∘ x S̄), those of x −(G δ Āᵀ + N δ S̄ᵀ), and so on
back through the lines above. Keys and queries are rows of one matrix [k; q], and weights and momentum columns of one,
[A | S]. What products take and give is of the inputs' type; states and their gradients are float32, or float64.

For the way back are kept, of every token, [k; q], [a | c] of both, e and ∂h, and of every chunk the state at its start
and the weights that its products took. h and what is written are made again, in passes that there are anyway.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from riverrun.kernels.common.whole import ceil_div
from riverrun.kernels.neural_memory.gated import fused
from riverrun.kernels.neural_memory.long_chunks_torch import IN_TORCH, Passes

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """N = B · H memories of K → 2 F → V; P: 2 with momentum, else 1; b: tokens of a chunk."""

    B: int
    T: int
    H: int
    K: int
    F: int
    V: int
    P: int
    b: int

    @classmethod
    def of(cls, o: torch.Tensor, first: torch.Tensor, b: int) -> "Sizes":
        """Of o (B, T, H, V) and the first layers' state (…, K, P, 2, F)."""
        (B, T, H, V), (K, P, _, F) = o.shape, first.shape[1:]
        return cls(B, T, H, K, F, V, P, b)

    @property
    def N(self) -> int:
        return self.B * self.H

    def chunks(self) -> list[tuple[int, int]]:
        """First tokens, and numbers of tokens."""
        return [(start, min(self.b, self.T - start)) for start in range(0, self.T, self.b)]

    def room(self, q: torch.Tensor, state: Tensors, save: bool) -> list[torch.Tensor]:
        """[k; q], [a | c], e and ∂h of all tokens; weights as products take them, and the states before all chunks but
        the first. If nothing is to be saved, of one chunk, and no states."""
        tokens, chunks = (self.T, ceil_div(self.T, self.b)) if save else (min(self.b, self.T), 1)
        widths = 2 * self.K, 4 * self.F, self.V, self.F
        of_tokens = [q.new_empty(tokens, self.N * width) for width in widths]
        weights = [q.new_empty(chunks, self.N, n, m) for n, m in ((self.K, 2 * self.F), (self.F, self.V))]
        return [*of_tokens, *weights, *(x.new_empty(chunks - 1, self.N, *x.shape[1:]) for x in state)]

    def of_chunk(self, room: Tensors, start: int, size: int) -> Iterator[torch.Tensor]:
        """[k; q] (N, 2 size, K), [a | c] (N, 2 size, 2 F), e (N, size, V) and ∂h (N, size, F)."""
        for x, columns in zip(room, (self.K, 2 * self.F, self.V, self.F)):
            yield x[start : start + size].view(self.N, -1, columns)


def passes_for(x: torch.Tensor) -> Passes:
    if not fused(x):
        return IN_TORCH
    from riverrun.kernels.neural_memory.triton_long_chunks import IN_TRITON

    return IN_TRITON


def walk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    writes: torch.Tensor,
    ends: torch.Tensor,
    state: Tensors,
    chunk_size: int,
    silu: bool,
    l2: bool,
    save: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """→ o (B, T, H, V), the final state, and `Sizes.room`.

    Args:
        writes: (L, P, B, T, H), G and N of the three layers, or what they share.
        ends: (L, 1 or 3, B, chunks, H), β, f and m.
        state: (N, K, P, 2, F) and (N, F, P, 1, V), or (H, …) that all sequences share.
    """
    s, passes = Sizes.of(v, state[0], chunk_size), passes_for(q)
    o, room = torch.empty_like(v), s.room(q, state, save)
    final = [x.new_empty(s.N, *x.shape[1:]) for x in state]
    of_writes, of_ends = _by_part(writes), _by_part(ends)
    for x, kept in zip(state, room[4:6]):
        kept[0].unflatten(0, (-1, len(x))).copy_(x[:, :, 0].flatten(2))
    chunks = s.chunks()
    for c, (start, size) in enumerate(chunks):
        here, then, last = c * save, (c + 1) * save, c + 1 == len(chunks)
        kq, ac, e, dh = s.of_chunk(room, start * save, size)
        w1, w2 = (kept[here] for kept in room[4:6])
        keys, h = kq[:, :size], q.new_empty(s.N, 2 * size, s.F)
        of_first, of_second = (q.new_empty(s.N, size, width) for width in (s.P * 2 * s.F, s.P * s.V))
        passes.gather((k, q), start, kq)
        torch.bmm(kq, w1, out=ac)
        passes.hidden(ac, h, silu)
        said = torch.bmm(h if l2 else h[:, size:], w2)
        passes.errors(said, v, of_writes[1], start, e, o, of_second)
        torch.bmm(e, w2.mT, out=dh)
        passes.gradients(dh, ac, of_writes[0], start, of_first, silu)
        written = torch.bmm(keys.mT, of_first), torch.bmm(h[:, :size].mT, of_second)
        after = [kept[c] for kept in room[6:]] if save and not last else final
        for part in range(2):
            narrow = None if last else room[4 + part][then]
            passes.step(state[part], written[part], of_ends[part], c, after[part], narrow)
        state = after
    return o, final, room


def walk_back(
    grad_o: torch.Tensor,
    grad_final: list[torch.Tensor] | None,
    writes: torch.Tensor,
    ends: torch.Tensor,
    state: Tensors,
    room: Tensors,
    chunk_size: int,
    silu: bool,
    l2: bool,
) -> list[torch.Tensor]:
    """→ the gradients of q, k, v, `writes`, `ends` and the initial `state`; grad_final None: zeros.

    What the last chunk writes then has none, nor have its keys and values: three quarters of the work on it. And the
    chunk before passes a momentum on that is only written to: a quarter.
    """
    s, passes, make = Sizes.of(grad_o, state[0], chunk_size), passes_for(grad_o), grad_o.new_empty
    by_q, by_k, by_v = make(s.B, s.T, s.H, s.K), make(s.B, s.T, s.H, s.K), torch.empty_like(grad_o)
    of_writes, of_ends = _by_part(writes), _by_part(ends)
    by_writes = writes.new_zeros(3, *writes.shape[1:])
    sums = ends.new_zeros(3, *ends.shape[1:], max(map(passes.blocks, state)))
    by_of_writes, by_of_ends = _by_part(by_writes), _by_part(sums)
    adjoint, narrow = ([x.new_empty(s.N, *x.shape[1:], dtype=dtype) for x in state] for dtype in (None, grad_o.dtype))
    by_state = [x if len(x) == len(y) else torch.empty_like(y) for x, y in zip(adjoint, state)]
    for x, *copies in zip(grad_final or (), adjoint, narrow):
        for copy in copies:
            copy.copy_(x)
    chunks = s.chunks()
    for c, (start, size) in reversed(list(enumerate(chunks))):
        live = s.P if grad_final is not None else min(s.P, len(chunks) - 1 - c)  # [Ā | S̄], Ā alone, or nothing
        rows = 2 * size if live else size  # of keys and queries, or of queries alone
        outer = slice(0 if live and l2 else rows - size, None)  # those whose outputs a gradient is of
        kq, ac, e, dh = s.of_chunk(room, start, size)
        w1, w2 = (kept[c] for kept in room[4:6])
        by_e, h, by_h = (make(s.N, rows, width) for width in (s.V, s.F, s.F))
        by_ac = make(s.N, rows, 2 * s.F)
        passes.gather((grad_o,), start, by_e[:, rows - size :])
        if live:
            by_dh, of_first, of_second = (make(s.N, size, width) for width in (s.F, live * 2 * s.F, live * s.V))
            d1, d2 = (x[:, :, :live].flatten(2) for x in narrow)
            through = torch.bmm(kq[:, :size], d1)
            made = of_first, by_dh, by_ac, h
            passes.gradients_back(dh, ac, through, of_writes[0], start, by_of_writes[0], *made, silu)
            through = torch.bmm(h[:, :size], d2)
            passes.errors_back(e, through, of_writes[1], start, by_of_writes[1], of_second, by_e)
            by_e[:, :size].baddbmm_(by_dh, w2)
        else:
            kq = kq[:, size:]
        torch.bmm(by_e[:, outer], w2.mT, out=by_h[:, outer])
        if live:
            by_h[:, :size].baddbmm_(of_second, d2.mT, beta=int(l2), alpha=-1)
        passes.hidden_back(by_h, ac, by_ac, h, rows - size, silu)
        by_w2 = torch.bmm(h[:, outer].mT, by_e[:, outer])
        by_w1, by_kq = torch.bmm(kq.mT, by_ac), torch.bmm(by_ac, w1.mT)
        if live:
            by_w2.baddbmm_(by_dh.mT, e)
            by_kq[:, :size].baddbmm_(of_first, d1.mT, alpha=-1)
            passes.spread(by_kq, start, (by_k, by_q))
            passes.spread(by_e[:, :size], start, (by_v,), -1)
        else:
            passes.spread(by_kq, start, (by_q,))
            for x in (by_k, by_v):
                x[:, start:].zero_()
        before = [kept[c - 1] for kept in room[6:]] if c else state
        for part, by_weights in enumerate((by_w1, by_w2)):
            given = before[part], of_ends[part], c, by_weights, adjoint[part], (adjoint if c else by_state)[part]
            passes.step_back(*given, narrow[part] if c else None, by_of_ends[part], live)
    if len(writes) == 1:
        by_writes = by_writes.sum(0, keepdim=True)
    by_ends = sums.sum((0, -1) if len(ends) == 1 else -1, keepdim=True).squeeze(-1)
    return [by_q, by_k, by_v, by_writes, by_ends, *by_state]


def _by_part(of_layers: torch.Tensor) -> list[torch.Tensor]:
    """(3 or 1, …) → of the first layers, (2, …), and of the second, (1, …)."""
    return [of_layers[:2].expand(2, *of_layers.shape[1:]), of_layers[-1:]]
