"""`gates.triton_gates` in one kernel, and its gradients in two, of which nothing but the gates is kept.

The matrices of a chunk are two recurrences over its rows, one column of each for every gradient i that enters,

    N_t = η_t N_{t−1} + θ_t e_t        G_t = (1 − α_t) G_{t−1} + N_t        from N_0 = G_0 = 0,

and f and m are their column of the momentum at the chunk's start: m_0 = 1, f_0 = 0. So no entry is a quotient or a sum
that cancels: each has a relative error of some roundings a token, whatever the gates beside it. An entry is two
multiply-adds, less than it takes to write it.

Backward the same rows are needed from the last to the first. The recurrences are walked once for the rows before every
block of `ROWS`; then from the last block to the first, over which they are walked again, in registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due, rounding
from riverrun.kernels.common.triton_chunks import chunk, cut
from riverrun.kernels.common.triton_math import exp
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.neural_memory.gates import ChunkGates, triton_gates
from riverrun.kernels.neural_memory.rule import Gates

CHUNKS = (16, 32, 64, 128)  # tokens of one
ROWS = 8  # of a block, whose numbers are asked for together
COLUMNS = 256  # of all heads of a program, at most


@triton.jit
def _rows(p, t, end, h, H: tl.constexpr, STRIDE: tl.constexpr, R: tl.constexpr):
    """What lies t, …, t + R − 1 strides after the pointers p (BH,) of heads h; zeros from the `end` on."""
    rows = ()
    for r in tl.static_range(R):
        mask = h < tl.where(t + r < end, H, 0)  # in the interpreter a vector & a scalar is no mask
        rows = rows + (tl.load(p + (t + r) * STRIDE, mask=mask, other=0.0),)  # type: ignore[assignment]
    return rows


@triton.jit
def _factors(p, t, tokens, h, H: tl.constexpr, R: tl.constexpr):
    """What R tokens keep, by its logarithms: all at padding."""
    logs, rows = _rows(p, t, tokens, h, H, H, R), ()
    for r in tl.static_range(R):
        rows = rows + (exp(logs[r]),)  # type: ignore[assignment]
    return rows


@triton.jit
def _step(G, N, keep, momentum, lr, own, here, MOMENTUM: tl.constexpr):
    """The next rows (BH, C); `own` is the token's own column, and not `here` it is padding."""
    new = tl.where(own, lr[:, None], 0.0)
    N = momentum[:, None] * N + new if MOMENTUM else new
    return keep[:, None] * G + tl.where(here, N, 0.0), N


@triton.jit
def forward_kernel(
    log_keep,  # (B, T, H)
    lr,  # (B, T, H)
    log_momentum,  # (B, T, H)
    decay,  # (M, H, C): β
    weight,  # (M, H, C, C): G
    carry,  # (M, H, C): f
    momentum_decay,  # (M, H): m of the last row
    momentum_weight,  # (M, H, C): N of the last row
    momentum,  # (M, H, C): m
    weight_before,  # (M, H, C // R, C): G before each block of R rows
    momentum_before,  # (M, H, C // R, C): N before it
    start,
    length,
    T,
    c_end,
    H: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
    R: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PACKED: tl.constexpr,
    OUTPUT: tl.constexpr,  # else for a backward pass: β, f, and the last three in place of G, m_b and N_b
):
    """Chunks too many are written too: all padding, they keep all and add nothing. `c_end` is C too, which the compiler
    is not to know: it would lay out a chunk's blocks in a row, and spill."""
    c, h = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH)
    token, tokens = chunk(start, length, c, T, C, PACKED)
    heads, column = h < H, tl.arange(0, C)
    tile = tl.broadcast_to(heads[:, None], [BH, C])
    gate, index = token * H + h, tl.cast(c, tl.int64) * H + h
    G = tl.zeros([BH, C], tl.float32)
    N = tl.zeros([BH, C], tl.float32)
    f = tl.zeros([BH], tl.float32)
    beta = tl.full([BH], 1.0, tl.float32)
    m = tl.full([BH], 1.0, tl.float32)
    for first in range(0, c_end, R):
        keeps = _factors(log_keep + gate, first, tokens, h, H, R)
        steps = _rows(lr + gate, first, tokens, h, H, H, R)
        momenta = _factors(log_momentum + gate, first, tokens, h, H, R) if MOMENTUM else keeps
        if not OUTPUT:
            block = (index * (C // R) + first // R)[:, None] * C + column[None, :]
            tl.store(weight_before + block, G, mask=tile)
            if MOMENTUM:
                tl.store(momentum_before + block, N, mask=tile)
        for r in tl.static_range(R):
            t = first + r
            here = t < tokens
            G, N = _step(G, N, keeps[r], momenta[r], steps[r], column[None, :] == t, here, MOMENTUM)
            beta *= keeps[r]
            tl.store(decay + index * C + t, beta, mask=heads)
            if MOMENTUM:
                m *= momenta[r]
                f = keeps[r] * f + tl.where(here, m, 0.0)
                tl.store(carry + index * C + t, f, mask=heads)
            if OUTPUT:
                tl.store(weight + (index * C + t)[:, None] * C + column[None, :], G, mask=tile)
            elif MOMENTUM:
                tl.store(momentum + index * C + t, m, mask=heads)
    if OUTPUT and MOMENTUM:
        tl.store(momentum_decay + index, m, mask=heads)
        tl.store(momentum_weight + index[:, None] * C + column[None, :], N, mask=tile)


@triton.jit
def backward_kernel(
    grad_decay,  # (M, H, C)
    grad_weight,  # (M, H, C, C); above the diagonal nothing is read
    grad_carry,  # (M, H, C)
    grad_momentum_decay,  # (M, H)
    grad_momentum_weight,  # (M, H, C)
    log_keep,  # (B, T, H)
    lr,  # (B, T, H)
    log_momentum,  # (B, T, H)
    decay,  # from here on as `forward_kernel` leaves them
    carry,
    momentum,
    weight_before,
    momentum_before,
    grad_log_keep,  # (B, T, H)
    grad_lr,  # (B, T, H)
    grad_log_momentum,  # (B, T, H)
    start,
    length,
    T,
    c_end,
    H: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
    R: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PACKED: tl.constexpr,
):
    c, h = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH)
    token, tokens = chunk(start, length, c, T, C, PACKED)
    if tokens > 0:
        heads, column = h < H, tl.arange(0, C)
        tile = tl.broadcast_to(heads[:, None], [BH, C])
        gate, index = token * H + h, tl.cast(c, tl.int64) * H + h
        row = index[:, None] * C + column[None, :]
        backwards = C - 1 - column[None, :]  # sums over the later tokens are those over the columns before
        row_backwards = index[:, None] * C + backwards
        # the adjoints of G, N and f, and in columns of tokens those of f, θ, log(1 − α) and log η
        of_G = tl.zeros([BH, C], tl.float32)
        of_N = tl.zeros([BH, C], tl.float32)
        of_f = tl.zeros([BH], tl.float32)
        by_f = tl.zeros([BH, C], tl.float32)
        by_lr = tl.zeros([BH, C], tl.float32)
        by_momentum = tl.zeros([BH, C], tl.float32)
        by_beta = tl.load(grad_decay + row_backwards, mask=tile, other=0.0)
        by_keep = tl.cumsum(by_beta * tl.load(decay + row_backwards, mask=tile, other=0.0), axis=1)
        if MOMENTUM:
            of_N = tl.load(grad_momentum_weight + row, mask=tile, other=0.0)
        for back in range(R, c_end + R, R):
            first = C - back
            keeps = _factors(log_keep + gate, first, tokens, h, H, R)
            steps = _rows(lr + gate, first, tokens, h, H, H, R)
            block = (index * (C // R) + first // R)[:, None] * C + column[None, :]
            G = tl.load(weight_before + block, mask=tile, other=0.0)
            if MOMENTUM:
                momenta = _factors(log_momentum + gate, first, tokens, h, H, R)
                of_fs = _rows(grad_carry + index * C, first, C, h, H, 1, R)
                N = tl.load(momentum_before + block, mask=tile, other=0.0)
            else:
                momenta, of_fs, N = keeps, keeps, G
            of_Gs = ()
            for r in tl.static_range(R):
                t = first + r
                # by fours, which are one access: the rest of the four on the diagonal is left out below
                lower = tile & (column // 4 * 4 <= t)[None, :]
                p = grad_weight + (index * C + t)[:, None] * C + column[None, :]
                of_Gs = of_Gs + (tl.load(p, mask=lower, other=0.0),)  # type: ignore[assignment]
            Gs = ()  # of the rows before
            Ns = ()
            for r in tl.static_range(R):
                t = first + r
                Gs = Gs + (G,)  # type: ignore[assignment]
                Ns = Ns + (N,)  # type: ignore[assignment]
                G, N = _step(G, N, keeps[r], momenta[r], steps[r], column[None, :] == t, t < tokens, MOMENTUM)
            for r in tl.static_range(R - 1, -1, -1):
                t = first + r
                here, own = t < tokens, backwards == t
                of_G += tl.where(column[None, :] <= t, of_Gs[r], 0.0)
                by_keep += tl.where(own, (keeps[r] * tl.sum(of_G * Gs[r], axis=1))[:, None], 0.0)
                if MOMENTUM:
                    of_N += tl.where(here, of_G, 0.0)
                    by_momentum += tl.where(own, (momenta[r] * tl.sum(of_N * Ns[r], axis=1))[:, None], 0.0)
                    by_lr = tl.where(column[None, :] == t, of_N, by_lr)
                    of_f += of_fs[r]
                    by_f = tl.where(own, of_f[:, None], by_f)
                    of_N *= momenta[r][:, None]
                    of_f *= keeps[r]
                else:
                    by_lr = tl.where(column[None, :] == t, of_G, by_lr)
                of_G *= keeps[r][:, None]
        at, at_backwards = gate[:, None] + column[None, :] * H, gate[:, None] + backwards * H
        here, here_backwards = tile & (column < tokens)[None, :], tile & (backwards < tokens)
        tl.store(grad_lr + at, by_lr, mask=here)
        if MOMENTUM:
            kept = exp(tl.load(log_keep + at_backwards, mask=here_backwards, other=0.0))
            by_keep += by_f * kept * tl.load(carry + row_backwards - 1, mask=tile & (backwards > 0), other=0.0)
            by_m = tl.where(backwards < tokens, by_f, 0.0)
            by_last = tl.load(grad_momentum_decay + index, mask=heads, other=0.0)
            by_m += tl.where(backwards == C - 1, by_last[:, None], 0.0)
            by_momentum += tl.cumsum(by_m * tl.load(momentum + row_backwards, mask=tile, other=0.0), axis=1)
            tl.store(grad_log_momentum + at_backwards, by_momentum, mask=here_backwards)
        tl.store(grad_log_keep + at_backwards, by_keep, mask=here_backwards)


class Launch:
    """The launches for gates (B, T, H)."""

    def __init__(self, gates: Gates, chunk_size: int, cu_seqlens: torch.Tensor | None):
        self.gates, self.momentum = gates, gates.log_momentum is not None
        chunks = cut(gates.lr, chunk_size, cu_seqlens)
        (_, T, H), C = gates.lr.shape, chunk_size
        heads = min(power_of_2_from(H), COLUMNS // C)
        self.shape, self.programs = (chunks.num_chunks, H, C), (chunks.num_chunks, ceil_div(H, heads))
        self.place = *chunks.tensors[2:], T, C
        self.options: dict[str, Any] = {
            "H": H, "C": C, "BH": heads, "R": ROWS, "MOMENTUM": self.momentum, "PACKED": chunks.packed,
            "num_warps": max(1, heads * C // 128),
        }  # fmt: skip

    def forward(self) -> ChunkGates:
        made = chunk_gates_like(self.gates, *self.shape)
        tensors = self._given(*self.gates, *made, None, None, None)
        forward_kernel[self.programs](*tensors, *self.place, **self.options, OUTPUT=True)
        return made

    def backward(self, grads: ChunkGates) -> Gates:
        """→ the gradients of the gates."""
        M, H, C = self.shape
        new = self.gates.lr.new_empty
        decay, weight_before = new(M, H, C), new(M, H, C // ROWS, C)
        carry, momentum, momentum_before = None, None, None
        if self.momentum:
            carry, momentum, momentum_before = new(M, H, C), new(M, H, C), new(M, H, C // ROWS, C)
        tensors = *self.gates, decay, None, carry, None, None, momentum, weight_before, momentum_before
        forward_kernel[self.programs](*self._given(*tensors), *self.place, **self.options, OUTPUT=False)
        made = self.gates.each(torch.empty_like)
        given = self._given(*grads, *self.gates, decay, carry, momentum, weight_before, momentum_before, *made)
        backward_kernel[self.programs](*given, *self.place, **self.options)
        return made

    def _given(self, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
        """Any tensor, which is not read, in the place of those that there are not."""
        return [self.gates.lr if x is None else x for x in tensors]


def chunk_gates_like(gates: Gates, M: int, H: int, C: int) -> ChunkGates:
    """Empty ones."""
    new = gates.lr.new_empty
    if gates.log_momentum is None:
        return ChunkGates(new(M, H, C), new(M, H, C, C), None, None, None)
    return ChunkGates(new(M, H, C), new(M, H, C, C), new(M, H, C), new(M, H), new(M, H, C))


def check(lr: torch.Tensor, momentum: bool, packed: bool, chunk_size: int, back: bool) -> None:
    """The self-check of the forward kernel for such gates, or with `back` of the kernels of gradients."""
    (_, _, H), C, device = lr.shape, chunk_size, lr.device

    def compare() -> float:
        draw, T = draws(device), 3 * C + 16  # several chunks; like most batches' a multiple of 16: compilers use that
        bounds = torch.tensor([0, 5, T], dtype=torch.int32, device=device) if packed else None
        gates = [-draw(1, T, H).exp() / C, draw(1, T, H).sigmoid(), -draw(1, T, H).exp() / C][: 3 if momentum else 2]

        def in_torch(*gates: torch.Tensor) -> list[torch.Tensor]:
            made = [x for x in triton_gates(Gates(*gates), C, bounds) if x is not None]
            return [torch.cat([x.flatten() for x in made]), *made]

        launch = Launch(Gates(*gates), C, bounds)
        if not back:
            made = [x for x in launch.forward() if x is not None]
            return deviation(made, in_double(in_torch, gates, None)[1:])
        empty = chunk_gates_like(launch.gates, *launch.shape)
        grads = ChunkGates(*(x if x is None else draw(*x.shape) for x in empty))  # type: ignore[arg-type]
        upstream = torch.cat([x.flatten() for x in grads if x is not None])
        of_gates = [x for x in launch.backward(grads) if x is not None]
        return deviation(of_gates, in_double(in_torch, gates, upstream)[-len(gates) :])

    sizes: dict[str, object] = {"H": H, "chunk_size": C, "momentum": momentum, "packed": packed, "gradients": back}
    check_once("gates of neural_memory", sizes, device, compare, rounding(lr.dtype))


@operator("chunk_gates_triton")
def _forward(
    log_keep: torch.Tensor,
    lr: torch.Tensor,
    log_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if is_due(lr):
        check(lr, log_momentum is not None, cu_seqlens is not None, chunk_size, back=False)
    return _or_empty(Launch(Gates(log_keep, lr, log_momentum), chunk_size, cu_seqlens).forward())


def _or_empty(made: ChunkGates) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operators return tensors: empty ones for those that there are not."""
    return tuple(made.decay.new_empty(0) if x is None else x for x in made)  # type: ignore[return-value]


@_forward.register_fake
def _(log_keep, lr, log_momentum, cu_seqlens, chunk_size):
    M, H = cut(lr, chunk_size, cu_seqlens).num_chunks, lr.shape[2]
    return _or_empty(chunk_gates_like(Gates(log_keep, lr, log_momentum), M, H, chunk_size))


@operator("chunk_gates_triton_backward")
def _backward(
    grad_decay: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_carry: torch.Tensor,
    grad_momentum_decay: torch.Tensor,
    grad_momentum_weight: torch.Tensor,
    log_keep: torch.Tensor,
    lr: torch.Tensor,
    log_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if is_due(lr):
        check(lr, log_momentum is not None, cu_seqlens is not None, chunk_size, back=True)
    grads = ChunkGates(grad_decay, grad_weight, grad_carry, grad_momentum_decay, grad_momentum_weight)
    of_keep, of_lr, of_momentum = Launch(Gates(log_keep, lr, log_momentum), chunk_size, cu_seqlens).backward(grads)
    return of_keep, of_lr, lr.new_empty(0) if of_momentum is None else of_momentum


@_backward.register_fake
def _(grad_decay, grad_weight, grad_carry, grad_momentum_decay, grad_momentum_weight, log_keep, lr, log_momentum, *_):
    of_momentum = lr.new_empty(0) if log_momentum is None else torch.empty_like(log_momentum)
    return torch.empty_like(log_keep), torch.empty_like(lr), of_momentum


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    of_keep, of_lr, of_momentum = _backward(*(x.contiguous() for x in grads), *tensors, ctx.chunk_size)
    return of_keep, of_lr, None if tensors[2] is None else of_momentum, None, None


_forward.register_autograd(_gradient, setup_context=_setup)


def chunk_gates_triton(gates: Gates, chunk_size: int, cu_seqlens: torch.Tensor | None) -> ChunkGates:
    """`gates.triton_gates` of gates (B, T, H), in float32; `chunk_size` is one of `CHUNKS`."""
    assert chunk_size in CHUNKS
    log_keep, lr, log_momentum = gates.each(lambda x: x.float().contiguous())
    decay, weight, *rest = _forward(log_keep, lr, log_momentum, cu_seqlens, chunk_size)
    return ChunkGates(decay, weight, *(rest if log_momentum is not None else [None] * 3))
