"""What the kernels of a backward pass hand on to each other of each chunk, a tile at a time."""

import triton
import triton.language as tl

from riverrun.kernels.neural_memory.triton_mlp_tiles import load_rows, store_rows

# matrices (tokens, hidden channels): H, φ'(Z), B ∘ φ''(Z), δ₁, H_q, ∂Z_q; of ∂δ₁ and ∂H what comes from within the
# chunk; ∂Z; and how many they are
HIDDEN, SLOPE, CURVED, ERROR, HIDDEN_Q, GRAD_Z_Q, GRAD_ERROR, GRAD_HIDDEN, GRAD_Z, HANDED = map(tl.constexpr, range(10))


@triton.jit
def _place(handed, slot, which, tile, C: tl.constexpr, BF: tl.constexpr, TILES: tl.constexpr):
    """Where a tile (C, BF) of what is handed on lies in (S, H, keep, HANDED, TILES, C, BF)."""
    return handed + ((slot * HANDED + which) * TILES + tile) * (C * BF)


@triton.jit
def hand_on(handed, x, slot, which, tile, C: tl.constexpr, BF: tl.constexpr, TILES: tl.constexpr):
    store_rows(_place(handed, slot, which, tile, C, BF, TILES), x, C, BF, BF, BF, C)


@triton.jit
def take(handed, slot, which, tile, C: tl.constexpr, BF: tl.constexpr, TILES: tl.constexpr):
    return load_rows(_place(handed, slot, which, tile, C, BF, TILES), C, BF, BF, BF, C)


@triton.jit
def slot_of(program, place, number, keep, ALL: tl.constexpr):
    """Where states, U and δ₂ of a chunk lie: among those of ALL chunks (M, H, …), or of its group's (S, H, keep, …)."""
    if ALL:
        return place
    else:
        return program * keep + number % keep
