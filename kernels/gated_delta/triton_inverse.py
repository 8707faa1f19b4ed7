"""The inverse of each chunk's (I + A), with A_ij = β_i Ā_ij = β_i exp(G_i − G_j) ⟨k_i, k_j⟩ for j < i and keys of unit
length; with it the log decays G, summed from the chunk's start, and the factors that bring the keys to unit length.

T = (I + A)⁻¹ by forward substitution, by blocks: T_ij = −T_ii Σ_{j≤l<i} A_il T_lj, for two blocks of 1, 2, 4 and 8 rows
in turn, then for the blocks of 16 of the chunk. What is computed on the way are entries of inverses, at most 2 for unit
keys; a Neumann series would take powers of A, which reach 10⁵ with repeated keys at β = 2.

The outputs need T diag(β), which is stored for them. Gradients also need (I + Ā diag(β))⁻¹ = I − U diag(β), where
T = I − diag(β) U: for them U is stored. Each term of row i of T − I has the factor β_i, so that it can be divided out
again where β_i = 0 was made 10⁻³⁰.

One warp a program: the work is many small dependent pieces, and there are thousands of chunks to fill the device.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.common.triton_math import dot, exp


@triton.jit
def _invert(A, row, EXACT: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A (16, 16)."""
    i, j = row[:, None], row[None, :]
    out = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -A, 0.0))  # of its blocks of 2
    for half in tl.static_range(1, 4):  # of the blocks of 4, 8, 16
        corner = tl.where((i >> (half + 1) == j >> (half + 1)) & (i >> half != j >> half), A, 0.0)
        out -= dot(out, dot(corner, out, EXACT=EXACT), EXACT=EXACT)
    return out


@triton.jit
def _beta(beta, step, steps, H: tl.constexpr):
    """β, never 0."""
    b = tl.load(beta + step * H, mask=step < steps, other=0.0).to(tl.float32)
    return tl.where(tl.abs(b) < 1e-30, 1e-30, b)


@triton.jit
def inverse_kernel(
    k,  # (B, T · n, H, K)
    beta,  # (B, T · n, H)
    g,  # (B, T, H)
    inverse,  # (M, H, C, C): T diag(β) or U
    decay,  # (M, H, C) float32: G
    units,  # (M, H, C) float32: 1 / ‖k‖, or 1
    start,
    length,
    T,
    forward,  # a bool: T diag(β). Not a constant: this kernel takes long to compile, and what differs is quick
    H: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,  # tokens a chunk, C // n
    BK: tl.constexpr,  # channels that are loaded at a time
    NORMALISE: tl.constexpr,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    NB: tl.constexpr = C // 16
    c, h = tl.program_id(0), tl.program_id(1)
    token, tokens = chunk(start, length, c, T, Q, PACKED)
    if tokens > 0:
        place = (tl.cast(c, tl.int64) * H + h) * C
        row = tl.arange(0, 16)
        k += (token * n * H + h) * K

        A = ()
        for _ in tl.static_range(NB * (NB + 1) // 2):
            A = A + (tl.zeros([16, 16], tl.float32),)
        for channel in range(0, K, BK):
            column = channel + tl.arange(0, BK)
            keys = ()
            for b in tl.static_range(NB):
                step = b * 16 + row
                mask = (step < tokens * n)[:, None] & (column < K)[None, :]
                keys = keys + (tl.load(k + step[:, None] * (H * K) + column[None, :], mask=mask, other=0.0),)
            new = ()
            for i in tl.static_range(NB):
                for j in tl.static_range(i + 1):
                    new = new + (dot(keys[i], tl.trans(keys[j]), A[i * (i + 1) // 2 + j]),)
            A = new

        # the factors of rows, for rows and for columns: through memory, from one layout to the other
        step = tl.arange(0, C)
        here = step < tokens * n
        if GATED:
            gate = tl.load(g + (token + step // n) * H + h, mask=here & (step % n == 0), other=0.0).to(tl.float32)
            G = tl.cumsum(gate, 0)
        else:
            G = tl.zeros([C], tl.float32)
        tl.store(decay + place + step, G)
        for i in tl.static_range(NB):
            if NORMALISE:
                squares = tl.where(row[:, None] == row[None, :], A[i * (i + 1) // 2 + i], 0.0)
                unit = tl.rsqrt(tl.sum(squares, 1) + 1e-6)
            else:
                unit = tl.full([16], 1.0, tl.float32)
            tl.store(units + place + i * 16 + row, unit)
        tl.debug_barrier()

        new = ()
        for i in tl.static_range(NB):
            step = i * 16 + row
            b = _beta(beta + (token * n * H + h), step, tokens * n, H) * tl.load(units + place + step)
            G_i = tl.load(decay + place + step)
            for j in tl.static_range(i + 1):
                at_j = place + j * 16 + row
                difference = G_i[:, None] - tl.load(decay + at_j)[None, :]
                factors = b[:, None] * tl.load(units + at_j)[None, :] * exp(tl.minimum(difference, 0.0))
                block = A[i * (i + 1) // 2 + j] * factors
                if i == j:
                    block = tl.where(row[:, None] > row[None, :], block, 0.0)
                new = new + (block,)
        A = new

        solved = ()
        for i in tl.static_range(NB):
            solved = solved + (_invert(A[i * (i + 1) // 2 + i], row, EXACT),)
        out = ()
        for i in tl.static_range(NB):
            for j in tl.static_range(i):
                sums = dot(A[i * (i + 1) // 2 + j], solved[j], EXACT=EXACT)
                for l in tl.static_range(j + 1, i):
                    sums = dot(A[i * (i + 1) // 2 + l], out[l * (l + 1) // 2 + j], sums, EXACT)
                out = out + (-dot(solved[i], sums, EXACT=EXACT),)
            out = out + (solved[i],)

        p = inverse + place * C + row[:, None] * C + row[None, :]
        for i in tl.static_range(NB):
            of_row = -1.0 / _beta(beta + (token * n * H + h), i * 16 + row, tokens * n, H)
            for j in tl.static_range(NB):
                if j > i:
                    block = tl.zeros([16, 16], tl.float32)
                else:
                    of_column = _beta(beta + (token * n * H + h), j * 16 + row, tokens * n, H)
                    block = out[i * (i + 1) // 2 + j] * tl.where(forward, of_column[None, :], of_row[:, None])
                    if i == j:
                        block = tl.where(forward | (row[:, None] > row[None, :]), block, 0.0)
                tl.store(p + i * 16 * C + j * 16, block.to(inverse.dtype.element_ty))
