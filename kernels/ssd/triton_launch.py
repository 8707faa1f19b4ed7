"""How the work of `ssd` is cut for its Triton kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.triton_chunks import Chunks, cut
from riverrun.kernels.common.triton_math import INTERPRETED
from riverrun.kernels.common.triton_segments import Segments, segment
from riverrun.kernels.common.whole import ceil_div, power_of_2_from

CHUNK = 64  # tokens, at most
TILE_NUMBERS = 8192
TILE_P = 64  # channels of a program, at most
LEAST = 64  # rows of a state, and channels of a chunk, in Hopper's products: with 16 or 32 Triton 3.6's code was wrong
WALKERS = 2  # that fit a multiprocessor


def _is_hopper() -> bool:
    """Or newer: matrix products of at least 64 rows, whose operands need no registers."""
    if INTERPRETED.value:
        return True
    return triton.runtime.driver.active.get_current_target().arch >= 90


@dataclass(frozen=True)
class Launch:
    """How the work on x (B, T, H, P) and B (B, T, G, N) is cut."""

    chunks: Chunks  # of sequences, or of segments
    segments: Segments | None
    dims: dict[str, Any]
    tile: int  # numbers of a chunk of B, or of a walker's state, at most
    channels: int  # of a tile of a head
    walkers: int  # channels of each program that walks
    splits: int  # of a group's heads, in the gradients

    @classmethod
    def of(
        cls, x: torch.Tensor, B: torch.Tensor, cu_seqlens: torch.Tensor | None, like: "Launch | None" = None
    ) -> "Launch":
        """`like`: a launch of the same heads whose programs this one is to have as well, for its kernels."""
        (_, T, H, P), (G, N) = x.shape, B.shape[2:]
        narrow = x.element_size() == 2  # products of float32 are three of narrower numbers
        least = LEAST if narrow and _is_hopper() else 16
        BN = max(least, power_of_2_from(N))
        tile = TILE_NUMBERS if narrow else TILE_NUMBERS // 4
        most = min(CHUNK if narrow and _is_hopper() else CHUNK // 2, tile // BN)
        Q = max(16, min(most, power_of_2_from(T)))
        dims = {"H": H, "G": G, "P": P, "N": N, "Q": Q, "BN": BN}
        widest, processors = _widest(P, tile // BN), multiprocessors(x)
        tokens = x[..., 0, 0]  # (B, T), which costs nothing to flatten
        segments = segment(tokens, Q, H * ceil_div(P, widest), WALKERS * processors, cu_seqlens)
        chunks = cut(x, Q, cu_seqlens) if segments is None else segments.chunks
        if like is not None:
            walkers, splits = like.walkers, like.splits
        else:
            walkers = _walkers(P, widest, chunks.num_sequences * H, processors)
            splits = _splits(H // G, 2 * chunks.num_chunks * G, processors)
        return cls(chunks, segments, dims, tile, max(least, _widest(P, TILE_P)), walkers, splits)

    @property
    def walks(self) -> int:
        """The programs that walk along all sequences."""
        return self.chunks.num_sequences * self.dims["H"] * ceil_div(self.dims["P"], self.walkers)


def _walkers(P: int, widest: int, walks: int, processors: int) -> int:
    """Channels of a program that walks: what registers have room for, or fewer where that would leave multiprocessors
    idle."""
    while widest > 16 and walks * ceil_div(P, widest) < processors:
        widest //= 2
    return widest


def _splits(heads: int, programs: int, processors: int) -> int:
    """Of a group's heads, in the gradients: as few as leave no multiprocessor idle."""
    return next((n for n in range(1, heads) if heads % n == 0 and n * programs >= processors), heads)


def _widest(P: int, room: int) -> int:
    """Channels of a program."""
    return max(16, min(TILE_P, room, power_of_2_from(P)))
