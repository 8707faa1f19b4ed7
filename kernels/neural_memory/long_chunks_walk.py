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
LAYERS = slice(0, 2), slice(2, 3)  # of both parts of a state, among the three


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
        """Of o (B, T, H, V) and the first layers' state (N, K, P, 2, F)."""
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
        return [*of_tokens, *weights, *(x.new_empty(chunks - 1, *x.shape) for x in state)]

    def of_chunk(self, room: Tensors, start: int, size: int) -> Iterator[torch.Tensor]:
        """[k; q] (N, 2 size, K), [a | c] (N, 2 size, 2 F), e (N, size, V) and ∂h (N, size, F)."""
        for x, columns in zip(room, (self.K, 2 * self.F, self.V, self.F)):
            yield x[start : start + size].view(self.N, -1, columns)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(N, size, D) → (B, size, H, D)."""
        return x.unflatten(0, (self.B, self.H)).transpose(1, 2)


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
        state: (N, K, P, 2, F) and (N, F, P, 1, V).
    """
    s, passes = Sizes.of(v, state[0], chunk_size), passes_for(q)
    o, final, room = torch.empty_like(v), [torch.empty_like(x) for x in state], s.room(q, state, save)
    writes, ends = (x.expand(3, -1, -1, -1, -1) for x in (writes, ends))
    for x, kept in zip(state, room[4:6]):
        kept[0].copy_(x[:, :, 0].flatten(2))
    chunks = s.chunks()
    for c, (start, size) in enumerate(chunks):
        tokens, here, then = slice(start, start + size), c * save, (c + 1) * save
        kq, ac, e, dh = s.of_chunk(room, start * save, size)
        w1, w2 = (kept[here] for kept in room[4:6])
        h = q.new_empty(s.N, 2 * size, s.F)
        passes.move(k[:, tokens], s.heads(kq[:, :size]))
        passes.move(q[:, tokens], s.heads(kq[:, size:]))
        passes.move(v[:, tokens], s.heads(e), 1 if l2 else -1)
        torch.bmm(kq, w1, out=ac)
        passes.hidden(ac, h, silu)
        passes.move(s.heads(torch.bmm(h[:, size:], w2)), o[:, tokens])

        if l2:
            e.baddbmm_(h[:, :size], w2, beta=-1)
        torch.bmm(e, w2.mT, out=dh)
        of_first, of_second = (q.new_empty(s.N, size, width) for width in (s.P * 2 * s.F, s.P * s.V))
        passes.gradients(dh, ac[:, :size], writes[LAYERS[0], :, :, tokens], of_first, silu)
        passes.errors(e, writes[LAYERS[1], :, :, tokens], of_second)
        written = torch.bmm(kq[:, :size].mT, of_first), torch.bmm(h[:, :size].mT, of_second)
        last = c + 1 == len(chunks)
        after = [kept[c] for kept in room[6:]] if save and not last else final
        for part, layers in enumerate(LAYERS):
            narrow = None if last else room[4 + part][then]
            passes.step(state[part], written[part], ends[layers, :, :, c], after[part], narrow)
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

    What the last chunk writes then has none, nor have its keys and values: three quarters of the work on it.
    """
    s, passes, make = Sizes.of(grad_o, state[0], chunk_size), passes_for(grad_o), grad_o.new_empty
    by_q, by_k, by_v = make(s.B, s.T, s.H, s.K), make(s.B, s.T, s.H, s.K), torch.empty_like(grad_o)
    shared = len(writes) == 1
    writes, ends = (x.expand(3, -1, -1, -1, -1) for x in (writes, ends))
    by_writes, by_ends = (x.new_zeros(x.shape) for x in (writes, ends))
    adjoint, narrow = ([torch.empty_like(x, dtype=dtype) for x in state] for dtype in (None, grad_o.dtype))
    for x, *copies in zip(grad_final or (), adjoint, narrow):
        for copy in copies:
            copy.copy_(x)
    for c, (start, size) in reversed(list(enumerate(s.chunks()))):
        tokens, written = slice(start, start + size), grad_final is not None or start + size < s.T
        kq, ac, e, dh = s.of_chunk(room, start, size)
        w1, w2 = (kept[c] for kept in room[4:6])
        by_e, h, by_h = make(s.N, 2 * size, s.V), make(s.N, 2 * size, s.F), make(s.N, 2 * size, s.F)
        by_ac, by_kq = torch.empty_like(ac), torch.empty_like(kq)
        passes.move(grad_o[:, tokens], s.heads(by_e[:, size:]))
        # the rows of keys and queries, or of queries alone, that take part; and those whose outputs a gradient is of
        rows = slice(0 if written else size, None)
        outer = slice(0 if written and l2 else size, None)
        if written:
            by_dh, of_first, of_second = (make(s.N, size, width) for width in (s.F, s.P * 2 * s.F, s.P * s.V))
            d1, d2 = (x.flatten(2) for x in narrow)
            of_gates = [[x[layers, :, :, tokens] for x in (writes, by_writes)] for layers in LAYERS]
            passes.hidden(ac[:, :size], h[:, :size], silu)
            passes.errors_back(e, torch.bmm(h[:, :size], d2), *of_gates[1], of_second, by_e[:, :size])
            passes.gradients_back(
                dh, ac[:, :size], torch.bmm(kq[:, :size], d1), *of_gates[0], of_first, by_dh, by_ac[:, :size], silu
            )
            by_e[:, :size].baddbmm_(by_dh, w2)
        torch.bmm(by_e[:, outer], w2.mT, out=by_h[:, outer])
        if written:
            by_h[:, :size].baddbmm_(of_second, d2.mT, beta=int(l2), alpha=-1)
        passes.hidden_back(by_h[:, rows], ac[:, rows], by_ac[:, rows], h[:, rows], size if written else 0, silu)
        by_w2 = torch.bmm(h[:, outer].mT, by_e[:, outer])
        by_w1 = torch.bmm(kq[:, rows].mT, by_ac[:, rows])
        torch.bmm(by_ac[:, rows], w1.mT, out=by_kq[:, rows])
        passes.move(s.heads(by_kq[:, size:]), by_q[:, tokens])
        if written:
            by_w2.baddbmm_(by_dh.mT, e)
            by_kq[:, :size].baddbmm_(of_first, d1.mT, alpha=-1)
            passes.move(s.heads(by_kq[:, :size]), by_k[:, tokens])
            passes.move(s.heads(by_e[:, :size]), by_v[:, tokens], -1)
        else:
            by_k[:, tokens], by_v[:, tokens] = 0, 0
        before = state if c == 0 else [kept[c - 1] for kept in room[6:]]
        for part, layers in enumerate(LAYERS):
            given = before[part], ends[layers, :, :, c], (by_w1, by_w2)[part], adjoint[part]
            passes.step_back(*given, narrow[part] if c else None, by_ends[layers, :, :, c] if written else None)
    by_gates = [x.sum(0, keepdim=True) if shared else x for x in (by_writes, by_ends)]
    return [by_q, by_k, by_v, *by_gates, *adjoint]
