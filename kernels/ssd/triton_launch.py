"""How the work of `ssd` is cut for its Triton kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.triton_chunks import Chunks, cut
from riverrun.kernels.common.triton_math import INTERPRETED
from riverrun.kernels.common.triton_segments import Segments, segment

CHUNK = 64  # tokens, at most
TILE_NUMBERS = 8192
TILE_P = 64  # channels of a program, at most
LEAST_ROWS = 64  # of a state in Hopper's matrix products: with 16, which need other ones, Triton 3.6's code faulted
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
    multiprocessors: int

    @classmethod
    def of(cls, x: torch.Tensor, B: torch.Tensor, cu_seqlens: torch.Tensor | None) -> "Launch":
        (_, T, H, P), (G, N) = x.shape, B.shape[2:]
        narrow = x.element_size() == 2  # products of float32 are three of narrower numbers
        BN = max(LEAST_ROWS if narrow and _is_hopper() else 16, triton.next_power_of_2(N))
        tile = TILE_NUMBERS if narrow else TILE_NUMBERS // 4
        most = min(CHUNK if narrow and _is_hopper() else CHUNK // 2, tile // BN)
        Q = max(16, min(most, triton.next_power_of_2(T)))
        dims = {"H": H, "G": G, "P": P, "N": N, "Q": Q, "BN": BN}
        walkers, processors = H * triton.cdiv(P, _widest(P, tile // BN)), multiprocessors(x)
        tokens = x[..., 0, 0]  # (B, T), which costs nothing to flatten
        segments = segment(tokens, Q, walkers, WALKERS * processors, cu_seqlens)
        chunks = cut(x, Q, cu_seqlens) if segments is None else segments.chunks
        return cls(chunks, segments, dims, tile, processors)

    @property
    def channels(self) -> int:
        """Of a tile of a head."""
        return _widest(self.dims["P"], TILE_P)

    def walk(self) -> tuple[int, int]:
        """The programs that walk along all sequences, and the channels of each: what registers have room for, or fewer
        where that would leave multiprocessors idle."""
        P, walks = self.dims["P"], self.chunks.num_sequences * self.dims["H"]
        channels = _widest(P, self.tile // self.dims["BN"])
        while channels > 16 and walks * triton.cdiv(P, channels) < self.multiprocessors:
            channels //= 2
        return walks * triton.cdiv(P, channels), channels

    @property
    def splits(self) -> int:
        """Of a group's heads, in the gradients: as few as leave no multiprocessor idle."""
        heads = self.dims["H"] // self.dims["G"]
        programs = 2 * self.chunks.num_chunks * self.dims["G"]
        return next((n for n in range(1, heads) if heads % n == 0 and n * programs >= self.multiprocessors), heads)


def _widest(P: int, room: int) -> int:
    """Channels of a program."""
    return max(16, min(TILE_P, room, triton.next_power_of_2(P)))
