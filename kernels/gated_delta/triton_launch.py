"""How the gated delta rule's work is cut for its Triton kernels, and what is prepared of each chunk before any walk."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.triton_chunks import Chunks, cut
from riverrun.kernels.common.triton_math import INTERPRETED
from riverrun.kernels.common.triton_segments import Segments, segment
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.gated_delta.triton_inverse import inverse_kernel
from riverrun.kernels.gated_delta.triton_scores import scores_kernel

WARPS = {"inverse": 1, "scores": 4, "forward": 4, "backward": 4, "between": 4, "within": 4, "gradients": 4}
STAGES = 2
TILE_K = 128  # at most
WALKERS = 2  # that fit a multiprocessor


@dataclass(frozen=True)
class Tiles:
    """Sub-steps of a chunk, and channels of the values that a walk holds, at most."""

    chunk: int
    values: int


HOPPER = Tiles(64, 64)  # whose matrix products take 64 rows from registers, and the rest from shared memory
EARLIER = Tiles(32, 32)


def tiles() -> Tiles:
    if INTERPRETED:
        return HOPPER
    return HOPPER if triton.runtime.driver.active.get_current_target().arch >= 90 else EARLIER


def tile(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`, or one that holds all of it if that is below 16."""
    factor = size & -size
    return min(factor, most) if factor >= 16 else max(16, power_of_2_from(size))


@dataclass(frozen=True)
class Launch:
    """How the work on q (B, T, H, K), k (B, T, n, H, K), v (B, T, n, H, V) is cut."""

    chunks: Chunks  # of sequences, or of segments
    segments: Segments | None
    dims: dict[str, Any]
    value_tile: int
    exact: bool

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, exact: bool) -> "Launch":
        (_, T, n, H, K), V = k.shape, v.shape[-1]
        most = tiles()
        size = max(16, min(most.chunk, power_of_2_from(T * n)), power_of_2_from(n))
        tokens = size // n
        key_tile = tile(K, TILE_K)
        dims = {
            "H": H, "n": n, "K": K, "C": size, "Q": tokens, "QP": max(16, power_of_2_from(tokens)),
            "BK": key_tile, "NK": ceil_div(K, key_tile),
        }  # fmt: skip
        value_tile = tile(V, most.values)
        room = WALKERS * multiprocessors(k)
        segments = segment(k, tokens, H * ceil_div(V, value_tile), room, cu_seqlens)
        chunks = cut(k, tokens, cu_seqlens) if segments is None else segments.chunks
        return cls(chunks, segments, dims, value_tile, exact or k.dtype == torch.float32)

    def walkers(self, columns: int) -> tuple[int, int]:
        """Programs that walk along all sequences, or segments, with so many columns of state."""
        return self.chunks.num_sequences * self.dims["H"], ceil_div(columns, self.value_tile)

    def all_sequences(self, k: torch.Tensor) -> torch.Tensor:
        """That the maps of all sequences, or segments, are wanted."""
        return torch.ones(self.chunks.num_sequences, dtype=torch.bool, device=k.device)

    def inner_type(self, k: torch.Tensor) -> torch.dtype:
        """Of what passes between kernels."""
        return torch.float32 if self.exact else k.dtype


Prepared = tuple[torch.Tensor, ...]


def prepare(
    launch: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    normalise: bool,
    *,
    forward: bool,
) -> Prepared:
    """→ the inverse, T diag(β) if `forward` else U, (M, H, C, C); decay and units (M, H, C); scores (M, H, QP, C);
    reads and the units of queries (M, H, QP)."""
    M, (H, C, QP) = launch.chunks.num_chunks, (launch.dims[x] for x in ("H", "C", "QP"))
    inverse, scores = (k.new_empty(M, H, rows, C, dtype=launch.inner_type(k)) for rows in (C, QP))
    decay, units = k.new_empty(2, M, H, C, dtype=torch.float32)
    reads, units_q = k.new_empty(2, M, H, QP, dtype=torch.float32)
    inverse_kernel[(M, H)](
        k, beta, beta if g is None else g, inverse, decay, units, *launch.chunks.tensors[2:], k.shape[1], forward,
        **{x: launch.dims[x] for x in ("H", "n", "K", "C", "Q")}, BK=min(32, launch.dims["BK"]),
        NORMALISE=normalise, GATED=g is not None, PACKED=launch.chunks.packed, EXACT=launch.exact,
        num_warps=WARPS["inverse"],
    )  # fmt: skip
    scores_kernel[(M, H)](
        q, k, decay, units, scores, reads, units_q, *launch.chunks.tensors[2:], k.shape[1], scale,
        **launch.dims, NORMALISE=normalise, PACKED=launch.chunks.packed, num_warps=WARPS["scores"],
    )  # fmt: skip
    return inverse, decay, units, scores, reads, units_q
