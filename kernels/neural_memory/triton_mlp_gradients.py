"""What one chunk of the walk backwards does with each layer, a tile of hidden channels at a time.

With the names of `triton_mlp_walk.py`, ∂X the gradient of X, W and S the weights and momentum before the chunk, and ∂W'
and ∂S' what comes from behind it, layer ₂ gives

    ∂H_q = W₂ ∂U_q β₂ + S₂ ∂U_q f₂ + H X        ∂H = H_q Xᵀ − ∂W₂' δ₂ diag(G₂b) − ∂S₂' δ₂ diag(N₂b)
    ∂δ₂ = −∂W₂'ᵀ H diag(G₂b) − ∂S₂'ᵀ H diag(N₂b) + …        X = −G₂ᵀ ∘ δ₂ᵀ ∂U_q

then layer ₁, with B = W₂ δ₂,

    ∂Z_q = ∂H_q ∘ φ'(Z_q)        ∂δ₁ = −∂Z_q (G₁ ∘ Qᵀ K) − ∂W₁'ᵀ K diag(G₁b) − ∂S₁'ᵀ K diag(N₁b)
    ∂B = ∂δ₁ ∘ φ'(Z)        ∂Z = ∂H ∘ φ'(Z) + ∂δ₁ ∘ B ∘ φ''(Z)        ∂δ₂ += W₂ᵀ ∂B

and only now ∂δ₂ is whole. From it follows ∂U, for δ₂ is a function of U, and in a second round

    ∂Z += (W₂ ∂U) ∘ φ'(Z)
    ∂W₂ = β₂b ∂W₂' + H_q diag(β₂) ∂U_qᵀ + H ∂Uᵀ + ∂B δ₂ᵀ        ∂S₂ = f₂b ∂W₂' + m₂ ∂S₂' + H_q diag(f₂) ∂U_qᵀ
    ∂W₁ᵀ = β₁b ∂W₁'ᵀ + ∂Z_q diag(β₁) Qᵀ + ∂Z Kᵀ        ∂S₁ᵀ = f₁b ∂W₁'ᵀ + m₁ ∂S₁'ᵀ + ∂Z_q diag(f₁) Qᵀ
    ∂Q = W₁ ∂Z_q β₁ + S₁ ∂Z_q f₁ + …        ∂K = W₁ ∂Z − ∂W₁' δ₁ diag(G₁b) − ∂S₁' δ₁ diag(N₁b) + …

Matrices (F, C) lie in memory: H, H_q and B, which becomes ∂B, in `passed`; ∂H_q, which becomes ∂Z_q, ∂H, which becomes
∂Z, δ₁ and φ'(Z) in `inner`.
"""

import triton
import triton.language as tl

from riverrun.kernels.neural_memory.triton_mlp_tiles import activation, load_row, load_tile, multiply, store_tile


@triton.jit
def _add_row(p, x, i, C: tl.constexpr):
    """Sums over the rows of x (rows, C) are added to what the tiles before tile `i` gave."""
    t = tl.arange(0, C)
    tl.store(p + t, tl.sum(x, 0) + tl.load(p + t, mask=t < i * C, other=0.0))


@triton.jit
def _add_product(p, x, y, i):
    """Σ x y likewise."""
    tl.store(p, tl.sum(tl.sum(x * y, 1), 0) + tl.load(p, mask=i > 0, other=0.0))


@triton.jit
def _add_ends(
    by_ends, state, adjoint, i, MOMENTUM: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Of β_b, f_b and m_b."""
    _add_product(by_ends, load_tile(adjoint, i, WIDTH, BW, BF), load_tile(state, i, WIDTH, BW, BF), i)
    if P == 2:
        tile = load_tile(state + MOMENTUM, i, WIDTH, BW, BF)
        _add_product(by_ends + 1, load_tile(adjoint, i, WIDTH, BW, BF), tile, i)
        _add_product(by_ends + 2, load_tile(adjoint + MOMENTUM, i, WIDTH, BW, BF), tile, i)
    tl.debug_barrier()


@triton.jit
def second_reads(
    state, passed, inner, by_u_q, crossed, reads, by_reads, C: tl.constexpr, P: tl.constexpr, F: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Pass on ∂H_q. `crossed` is X."""
    dtype: tl.constexpr = by_u_q.dtype
    for i in tl.range(0, F, BF, disable_licm=True):
        by_hidden_q = multiply(load_tile(passed, i, C, C, BF), crossed, dtype)
        for j in tl.static_range(P):
            share = multiply(load_tile(state + j * MOMENTUM, i, V, BV, BF), by_u_q, dtype)
            _add_row(by_reads + j * C, share * load_tile(passed + F * C, i, C, C, BF).to(tl.float32), i, C)
            by_hidden_q += share * load_row(reads + j * C, C)
        store_tile(inner, by_hidden_q.to(dtype), i, C, C, BF)
        tl.debug_barrier()


@triton.jit
def first_reads(
    state, passed, inner, x, x_q, scores, reads, by_reads, C: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, MOMENTUM: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Pass on ∂Z_q, δ₁ and φ'(Z), and B ∘ φ''(Z) instead of B."""
    dtype: tl.constexpr = x.dtype
    for i in tl.range(0, F, BF, disable_licm=True):
        tile = load_tile(state, i, K, BK, BF)
        _, slope, curvature = activation(multiply(tile, x, dtype), SILU)
        back = load_tile(passed + 2 * F * C, i, C, C, BF).to(tl.float32)
        tl.debug_barrier()
        store_tile(passed + 2 * F * C, (back * curvature).to(dtype), i, C, C, BF)
        store_tile(inner + 3 * F * C, slope.to(dtype), i, C, C, BF)
        d1 = (back * slope).to(dtype)
        store_tile(inner + 2 * F * C, d1, i, C, C, BF)
        read = multiply(tile, x_q, dtype)
        z_q = read * load_row(reads, C) - multiply(d1, scores, dtype)
        if P == 2:
            moved = multiply(load_tile(state + MOMENTUM, i, K, BK, BF), x_q, dtype)
            z_q += moved * load_row(reads + C, C)
        _, slope_q, _ = activation(z_q, SILU)
        by_z_q = load_tile(inner, i, C, C, BF).to(tl.float32) * slope_q
        _add_row(by_reads, by_z_q * read, i, C)
        if P == 2:
            _add_row(by_reads + C, by_z_q * moved, i, C)
        tl.debug_barrier()
        store_tile(inner, by_z_q.to(dtype), i, C, C, BF)
    tl.debug_barrier()


@triton.jit
def second_writes(
    adjoint, passed, inner, d2, crossed, writes, by_writes, C: tl.constexpr, P: tl.constexpr, F: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """→ its share of ∂δ₂ (BV, C), and Hᵀ H_q (C, C). Pass on its share of ∂H."""
    dtype: tl.constexpr = d2.dtype
    by_d2, products = tl.zeros([BV, C], tl.float32), tl.zeros([C, C], tl.float32)
    for i in tl.range(0, F, BF, disable_licm=True):
        hidden_q = load_tile(passed + F * C, i, C, C, BF)
        products = multiply(tl.trans(load_tile(passed, i, C, C, BF)), hidden_q, dtype, products)
        by_hidden = multiply(hidden_q, tl.trans(crossed), dtype)
        for j in tl.static_range(P):
            share = -multiply(load_tile(adjoint + j * MOMENTUM, i, V, BV, BF), d2, dtype)
            _add_row(by_writes + j * C, share * load_tile(passed, i, C, C, BF).to(tl.float32), i, C)
            by_hidden += share * load_row(writes + j * C, C)
        store_tile(inner + F * C, by_hidden.to(dtype), i, C, C, BF)
        tl.debug_barrier()
        hidden = load_tile(passed, i, C, C, BF).to(tl.float32)
        for j in tl.static_range(P):
            tile = tl.trans(load_tile(adjoint + j * MOMENTUM, i, V, BV, BF))
            by_d2 = multiply(tile, hidden * -load_row(writes + j * C, C), dtype, by_d2)
    return by_d2, products


@triton.jit
def first_writes(
    state, adjoint, passed, inner, x, scores, by_d2, writes, by_writes, C: tl.constexpr, P: tl.constexpr,
    K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """→ the whole ∂δ₂ (BV, C). Pass on ∂B, and ∂Z but for the share of ∂U."""
    dtype: tl.constexpr = x.dtype
    for i in tl.range(0, F, BF, disable_licm=True):
        by_d1 = -multiply(load_tile(inner, i, C, C, BF), tl.trans(scores), dtype)
        for j in tl.static_range(P):
            share = -multiply(load_tile(adjoint + j * MOMENTUM, i, K, BK, BF), x, dtype)
            _add_row(by_writes + j * C, share * load_tile(inner + 2 * F * C, i, C, C, BF).to(tl.float32), i, C)
            by_d1 += share * load_row(writes + j * C, C)
        slope = load_tile(inner + 3 * F * C, i, C, C, BF).to(tl.float32)
        by_z = by_d1 * load_tile(passed + 2 * F * C, i, C, C, BF).to(tl.float32)
        by_z += slope * load_tile(inner + F * C, i, C, C, BF).to(tl.float32)
        by_back = (by_d1 * slope).to(dtype)
        tl.debug_barrier()
        store_tile(inner + F * C, by_z.to(dtype), i, C, C, BF)
        store_tile(passed + 2 * F * C, by_back, i, C, C, BF)
        by_d2 = multiply(tl.trans(load_tile(state, i, V, BV, BF)), by_back, dtype, by_d2)
    tl.debug_barrier()
    return by_d2


@triton.jit
def second_update(
    state, adjoint, passed, inner, d2, by_u, by_u_q, reads, ends, by_ends, C: tl.constexpr, P: tl.constexpr,
    F: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Make ∂W₂ and ∂S₂ of ∂W₂' and ∂S₂', and pass on the whole ∂Z."""
    dtype: tl.constexpr = d2.dtype
    for i in tl.range(0, F, BF, disable_licm=True):
        by_z = multiply(load_tile(state, i, V, BV, BF), by_u, dtype)
        by_z *= load_tile(inner + 3 * F * C, i, C, C, BF).to(tl.float32)
        by_z += load_tile(inner + F * C, i, C, C, BF).to(tl.float32)
        tl.debug_barrier()
        store_tile(inner + F * C, by_z.to(dtype), i, C, C, BF)
        _add_ends(by_ends, state, adjoint, i, MOMENTUM, V, BV, BF, P)
        hidden_q = load_tile(passed + F * C, i, C, C, BF).to(tl.float32)
        if P == 2:
            tile = load_tile(adjoint, i, V, BV, BF) * tl.load(ends + 1)
            tile += load_tile(adjoint + MOMENTUM, i, V, BV, BF) * tl.load(ends + 2)
            tile += multiply(hidden_q * load_row(reads + C, C), tl.trans(by_u_q), dtype)
            tl.debug_barrier()
            store_tile(adjoint + MOMENTUM, tile, i, V, BV, BF)
        tile = load_tile(adjoint, i, V, BV, BF) * tl.load(ends)
        tile += multiply(hidden_q * load_row(reads, C), tl.trans(by_u_q), dtype)
        tile += multiply(load_tile(passed, i, C, C, BF), tl.trans(by_u), dtype)
        tile += multiply(load_tile(passed + 2 * F * C, i, C, C, BF), tl.trans(d2), dtype)
        tl.debug_barrier()
        store_tile(adjoint, tile, i, V, BV, BF)
    tl.debug_barrier()


@triton.jit
def first_update(
    state, adjoint, inner, x, x_q, reads, ends, writes, by_ends, C: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """→ its shares of ∂Q and ∂K (BK, C), and δ₁ᵀ ∂Z_q (C, C). Make ∂W₁ and ∂S₁ of ∂W₁' and ∂S₁'."""
    dtype: tl.constexpr = x.dtype
    by_q, by_k, products = tl.zeros([BK, C], tl.float32), tl.zeros([BK, C], tl.float32), tl.zeros([C, C], tl.float32)
    for i in tl.range(0, F, BF, disable_licm=True):
        by_z_q = load_tile(inner, i, C, C, BF)
        d1 = load_tile(inner + 2 * F * C, i, C, C, BF)
        products = multiply(tl.trans(d1), by_z_q, dtype, products)
        tile = tl.trans(load_tile(state, i, K, BK, BF))
        by_q = multiply(tile, by_z_q.to(tl.float32) * load_row(reads, C), dtype, by_q)
        by_k = multiply(tile, load_tile(inner + F * C, i, C, C, BF), dtype, by_k)
        if P == 2:
            tile = tl.trans(load_tile(state + MOMENTUM, i, K, BK, BF))
            by_q = multiply(tile, by_z_q.to(tl.float32) * load_row(reads + C, C), dtype, by_q)
        for j in tl.static_range(P):
            tile = tl.trans(load_tile(adjoint + j * MOMENTUM, i, K, BK, BF))
            by_k = multiply(tile, d1.to(tl.float32) * -load_row(writes + j * C, C), dtype, by_k)
        _add_ends(by_ends, state, adjoint, i, MOMENTUM, K, BK, BF, P)
        if P == 2:
            tile = load_tile(adjoint, i, K, BK, BF) * tl.load(ends + 1)
            tile += load_tile(adjoint + MOMENTUM, i, K, BK, BF) * tl.load(ends + 2)
            tile += multiply(by_z_q.to(tl.float32) * load_row(reads + C, C), tl.trans(x_q), dtype)
            tl.debug_barrier()
            store_tile(adjoint + MOMENTUM, tile, i, K, BK, BF)
        tile = load_tile(adjoint, i, K, BK, BF) * tl.load(ends)
        tile += multiply(by_z_q.to(tl.float32) * load_row(reads, C), tl.trans(x_q), dtype)
        tile += multiply(load_tile(inner + F * C, i, C, C, BF), tl.trans(x), dtype)
        tl.debug_barrier()
        store_tile(adjoint, tile, i, K, BK, BF)
    tl.debug_barrier()
    return by_q, by_k, products
