"""The gradients of what happens within a chunk of a linear memory: of the weights G and of the products of its queries
and keys, from dO, E and Y (see `triton_linear_walk.py`).

    dP = −dO Eᵀ        dA = −Y Eᵀ (online, below the diagonal)
    dG = dP ∘ Q Kᵀ, and dA ∘ K Kᵀ a row early        X = dP ∘ G        Z = dA ∘ G⁻

X and Z are the gradients of Q Kᵀ and K Kᵀ. A row r of G is for what the token r reads, or r + 1 if tokens read before
they write, and for the error of the token r + 1: rows of tokens are loaded from that one on, so that all that is here,
X and Z too, has the rows of G.
"""

import triton
import triton.language as tl

from riverrun.kernels.common.triton_chunks import chunk
from riverrun.kernels.neural_memory.triton_linear_prepare import products_of_rows


@triton.jit(do_not_specialize=["T"])
def within_kernel(
    grad_o,  # (B, T, H, V)
    q,  # (B, T, H, K)
    k,  # (B, T, H, K)
    weight,  # (M, H, C, C) float32
    errors,  # (B, T, H, V): E
    grad_v,  # (B, T, H, V): −Y
    grad_weight,  # (M, H, C, C) float32: what G has here; its last row has more
    X,  # (M, H, C, C)
    Z,  # (M, H, C, C)
    start,
    length,
    T,
    k_end,
    v_end,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LATE: tl.constexpr,
    ONLINE: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    c, h = tl.program_id(0), tl.program_id(1)
    token, tokens = chunk(start, length, c, T, C, PACKED)
    if tokens > 0:
        index = tl.cast(c, tl.int64) * H + h
        r = tl.arange(0, C)
        place_k, place_v = (token * H + h) * K, (token * H + h) * V
        at = index * C * C + r[:, None] * C + r[None, :]
        lower = r[:, None] >= r[None, :]
        here, reading = r < tokens, r + LATE < tokens
        by_P = products_of_rows(
            grad_o + place_v + LATE * H * V, errors + place_v, r, reading, here, H * V, v_end, V, BV, STAGES
        )
        by_P = tl.where(lower, -by_P, 0.0)
        by_G = by_P * products_of_rows(
            q + place_k + LATE * H * K, k + place_k, r, reading, here, H * K, k_end, K, BK, STAGES
        )
        tl.store(X + at, (by_P * tl.load(weight + at)).to(X.dtype.element_ty))
        if ONLINE:
            learning = r + 1 < tokens
            by_A = products_of_rows(
                grad_v + place_v + H * V, errors + place_v, r, learning, here, H * V, v_end, V, BV, STAGES
            )
            by_A = tl.where(lower, by_A, 0.0)
            by_G += by_A * products_of_rows(
                k + place_k + H * K, k + place_k, r, learning, here, H * K, k_end, K, BK, STAGES
            )
            tl.store(Z + at, (by_A * tl.load(weight + at)).to(Z.dtype.element_ty))
        tl.store(grad_weight + at, by_G)
