"""What the walks of a linear memory need of each chunk before them: P = (Q Kᵀ) ∘ G, which takes a chunk's writes to its
reads, and for the online rule T = (I + G⁻ ∘ K Kᵀ)⁻¹, which takes errors at the weights of the chunk's start to those at
the weights that each token finds. G⁻ is G a row late; so is the G of P where tokens read before they write.

T is by forward substitution, by blocks: from the inverses of two blocks of 1, 2, 4, … rows the corner between them is
−T₂₂ A₂₁ T₁₁. What is computed on the way are entries of inverses; a Neumann series would take powers of A, which are
orders of magnitude larger.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.common.triton_math import dot
from riverrun.kernels.gated_delta.triton_products import load_rows


@triton.jit
def late(p, t, SHIFT: tl.constexpr, first):
    """The entries of tokens t, SHIFT tokens late: `first` where there was none."""
    return tl.load(p + t - SHIFT, mask=t >= SHIFT, other=first)


@triton.jit
def late_rows(p, t, SHIFT: tl.constexpr, C: tl.constexpr):
    """The rows of a matrix (C, C), SHIFT rows late: zeros where there was none."""
    mask = tl.broadcast_to((t >= SHIFT)[:, None], [C, C])
    return tl.load(p + (t - SHIFT)[:, None] * C + t[None, :], mask=mask, other=0.0)


@triton.jit
def products_of_rows(
    x, y, t, here_x, here_y, STRIDE: tl.constexpr, end, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """⟨x_t, y_j⟩ (C, C) of rows of WIDTH numbers, which lie STRIDE apart. `end` is WIDTH too, which the compiler is not
    to know: it would lay out short loops in a row, and spill."""
    out = tl.zeros([t.shape[0], t.shape[0]], tl.float32)
    for start in tl.range(0, end, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        rows = load_rows(x, t, here_x, STRIDE, column, WIDTH)
        out = dot(rows, tl.trans(load_rows(y, t, here_y, STRIDE, column, WIDTH)), out)
    return out


@triton.jit
def _inverse(A, t, C: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A (C, C), C = 2^LEVELS."""
    i, j = t[:, None], t[None, :]
    out = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -A, 0.0))  # of its blocks of 2
    for half in tl.static_range(1, LEVELS):  # of the blocks of 4, 8, …
        corner = tl.where((i >> (half + 1) == j >> (half + 1)) & (i >> half != j >> half), A, 0.0)
        out -= dot(out, dot(corner, out, EXACT=EXACT), EXACT=EXACT)
    return out


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    q,  # (B, T, H, K)
    k,  # (B, T, H, K)
    weight,  # (M, H, C, C) float32: G
    scores,  # (M, H, C, C): −P
    inverse,  # (M, H, C, C): T
    start,
    length,
    T,
    k_end,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    LATE: tl.constexpr,  # 1 if tokens read before they write, else 0
    ONLINE: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    c, h = tl.program_id(0), tl.program_id(1)
    token, tokens = chunk(start, length, c, T, C, PACKED)
    if tokens > 0:
        index = tl.cast(c, tl.int64) * H + h
        t = tl.arange(0, C)
        here, place = t < tokens, (token * H + h) * K
        at = index * C * C + t[:, None] * C + t[None, :]
        P = products_of_rows(q + place, k + place, t, here, here, H * K, k_end, K, BK, STAGES)
        P *= -late_rows(weight + index * C * C, t, LATE, C)
        tl.store(scores + at, P.to(scores.dtype.element_ty))
        if ONLINE:
            A = products_of_rows(k + place, k + place, t, here, here, H * K, k_end, K, BK, STAGES)
            A *= late_rows(weight + index * C * C, t, 1, C)
            A = tl.where(t[:, None] > t[None, :], A, 0.0)
            tl.store(inverse + at, _inverse(A, t, C, LEVELS, EXACT).to(inverse.dtype.element_ty))
