"""How the two-layer memory's work is cut for its Triton kernels, and in which form they take gates and states."""

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from riverrun.kernels.common.triton_chunks import Chunks, cut
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.neural_memory.gates import ChunkGates, late
from riverrun.kernels.neural_memory.rule import Weights

WARPS = {2: 8, 4: 4}  # by bytes a number: with eight, Triton 3.6's products of float32 are wrong on Hopper
TILE_F = {2: 128, 4: 32}  # hidden channels of a tile, at most, by bytes a number: eight warps' rows; what fits on chip


@dataclass(frozen=True)
class Launch:
    """How the work on k (B, T, H, K), v (B, T, H, V) and a state (S, H, P, F (K + V)) is cut into chunks of C tokens.

    Attributes:
        keep: g, chunks of a group, whose first state is kept for a backward pass. Sequences of average length have as
            many groups, so that what is kept is as large as what one group needs when it is recomputed.
        longest: chunks of the longest sequence that there may be.
    """

    chunks: Chunks
    keep: int
    longest: int
    options: dict[str, Any]

    @classmethod
    def of(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor,
        norm_weight: torch.Tensor | None,
        state: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        silu: bool,
        residual: bool,
    ) -> "Launch":
        """`weight` is a layer's G (M, H, C, C)."""
        (_, T, H, K), V, C, (P, size) = k.shape, v.shape[-1], weight.shape[-1], state.shape[2:]
        F, chunks = size // (K + V), cut(k, C, cu_seqlens)
        keep = isqrt(ceil_div(chunks.num_chunks, chunks.num_sequences) - 1) + 1
        options = {"H": H, "K": K, "F": F, "V": V, "C": C, "P": P}
        options |= {"BK": power_of_2_from(K), "BV": power_of_2_from(V), "BF": min(TILE_F[k.element_size()], F & -F)}
        options |= {"NORM": norm_weight is not None, "RESIDUAL": residual, "SILU": silu, "PACKED": chunks.packed}
        options |= {"num_warps": WARPS[k.element_size()], "num_stages": 1}
        return cls(chunks, keep, ceil_div(T, C), options)

    @property
    def programs(self) -> tuple[int]:
        return (self.chunks.num_sequences * self.options["H"],)

    @property
    def num_checkpoints(self) -> int:
        """At most: every sequence has one less than groups."""
        return self.chunks.num_chunks // self.keep

    def hidden(self, like: torch.Tensor, slots: int, matrices: int) -> torch.Tensor:
        """Room for so many matrices (F, C) of all heads, `slots` times."""
        return like.new_empty(slots, self.options["H"], matrices, self.options["F"], self.options["C"])


def as_kernels_take(gates: ChunkGates, read: str) -> tuple[torch.Tensor, ...]:
    """→ reads (M, H, P, b): β and f of the memory that each token reads; its G (M, H, b, b); ends (M, H, 1 or 3): β, f
    and m of a chunk's end; writes (M, H, P, b): G and N of its end. P is 2 with momentum, else 1."""
    of_reads = late(gates) if read == "before" else gates
    decay, weight = gates.decay[..., -1], gates.weight[..., -1, :]
    if gates.carry is None:
        rows = of_reads.decay[:, :, None], of_reads.weight, decay[..., None], weight[:, :, None]
    else:
        assert of_reads.carry is not None and gates.momentum_decay is not None and gates.momentum_weight is not None
        rows = (
            torch.stack([of_reads.decay, of_reads.carry], 2),
            of_reads.weight,
            torch.stack([decay, gates.carry[..., -1], gates.momentum_decay], -1),
            torch.stack([weight, gates.momentum_weight], 2),
        )
    return tuple(x.float().contiguous() for x in rows)


def pack(weights: Weights, momentum: Weights | None, P: int) -> torch.Tensor:
    """(S, H, K, F) and (S, H, F, V), and what momentum there is (None: zeros) → (S, H, P, F (K + V))."""
    blocks = [_block(*weights)]
    if P == 2:
        blocks.append(torch.zeros_like(blocks[0]) if momentum is None else _block(*momentum))
    return torch.stack(blocks, 2)


def _block(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([first.float().mT.flatten(2), second.float().flatten(2)], -1)


def unpack(state: torch.Tensor, K: int, V: int) -> list[Weights]:
    """The inverse: of the weights, and of the momentum if there is one."""
    F = state.shape[-1] // (K + V)
    parts = [block.split([F * K, F * V], -1) for block in state.unbind(2)]
    return [(first.unflatten(-1, (F, K)).mT.contiguous(), second.unflatten(-1, (F, V))) for first, second in parts]
