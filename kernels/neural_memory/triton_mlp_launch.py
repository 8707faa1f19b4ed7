"""How the two-layer memory's work is cut for its Triton kernels, and in which form they take gates and states."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch

from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.triton_chunks import Chunks, cut
from riverrun.kernels.common.triton_math import INTERPRETED
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.neural_memory.gates import ChunkGates, late
from riverrun.kernels.neural_memory.rule import Weights

TILES = {2: 64, 4: 32}  # hidden channels of a tile, at most, by bytes a number
ALONE = INTERPRETED.value  # the interpreter runs one program after another: none could wait for the next

Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Launch:
    """How the work on k (B, T, H, K), v (B, T, H, V) and a state (S, H, P, F (K + V)) is cut into chunks of C tokens.

    Attributes:
        save: the states that a backward pass finds: "root", those before groups of chunks but the first; "all", every
            chunk's; or "nothing".
        keep: g, chunks of a group, which a backward pass takes at a time. Sequences of average length have as many
            groups, so that what is kept of groups' starts is as large as what one group needs when it is recomputed.
        longest: chunks of the longest sequence that there may be.
        tiles: of a head's hidden channels.
        teams: heads at a time whose state is on chip.
    """

    T: int
    chunks: Chunks
    save: str
    keep: int
    longest: int
    tiles: int
    teams: int
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
        save: str,
        max_seqlen: int,
    ) -> "Launch":
        """`weight` is a layer's G (M, H, C, C)."""
        (_, T, H, K), V, C, (P, size) = k.shape, v.shape[-1], weight.shape[-1], state.shape[2:]
        F, chunks = size // (K + V), cut(k, C, cu_seqlens)
        keep = isqrt(ceil_div(chunks.num_chunks, chunks.num_sequences) - 1) + 1
        BF = F & -F if ALONE else min(TILES[k.element_size()], F & -F)
        tiles = F // BF
        teams = min(chunks.num_sequences * H, max(multiprocessors(k) // tiles, 1))
        options = {"H": H, "K": K, "F": F, "V": V, "C": C, "P": P}
        options |= {"WK": power_of_2_from(K), "WV": power_of_2_from(V), "BF": BF}
        options |= {"NORM": norm_weight is not None, "RESIDUAL": residual, "SILU": silu, "PACKED": chunks.packed}
        options |= {"TILES": tiles, "SHARE": power_of_2_from(ceil_div(C, tiles)), "ALL": save == "all"}
        options |= {"num_warps": 8, "num_stages": 1}
        return cls(T, chunks, save, keep, ceil_div(max_seqlen, C), tiles, teams, options)

    @property
    def heads(self) -> int:
        """Of all sequences."""
        return self.chunks.num_sequences * self.options["H"]

    @property
    def groups(self) -> range:
        """The first chunks of the longest sequence's groups."""
        return range(0, self.longest, self.keep)

    @property
    def num_checkpoints(self) -> int:
        """At most: every sequence has one less than groups."""
        return self.chunks.num_chunks // self.keep

    def to_save(self, v: torch.Tensor, norm_weight: torch.Tensor | None, state: torch.Tensor) -> Saved:
        """Room for what a backward pass finds, or of no numbers: what was read before a norm (B, T, H, V); states
        (·, H, P, F (K + V)), of groups in the type of `state`, or of all chunks in that of v; and of all chunks U in
        the one type and δ₂ in the other (M, H, C, V)."""
        M, (H, C, V) = self.chunks.num_chunks, (self.options[name] for name in "HCV")
        has_norm = self.save != "nothing" and norm_weight is not None
        before_norm = torch.empty_like(v) if has_norm else v.new_empty(0)
        if self.save == "all":
            return before_norm, v.new_empty(M, *state.shape[1:]), state.new_empty(M, H, C, V), v.new_empty(M, H, C, V)
        checkpoints = state.new_empty(self.num_checkpoints if self.save == "root" else 0, *state.shape[1:])
        return before_norm, checkpoints, state.new_empty(0), v.new_empty(0)

    def of_teams(self, kernel: Any, *tensors: torch.Tensor, **options: bool) -> Callable[..., Any]:
        """What starts a kernel of programs that meet."""
        if ALONE and self.tiles > 1:
            raise ValueError("Triton's interpreter runs two-layer memories with a power of 2 of hidden channels only")
        place = *self.chunks.tensors[:2], self.T, self.keep, self.heads

        def start(*group: int) -> None:
            counters = torch.zeros(self.teams, dtype=torch.int32, device=tensors[0].device)
            grid = (self.teams * self.tiles,)
            kernel[grid](*tensors, counters, *place, *group, **self.options, **options, launch_cooperative_grid=True)

        return start

    def of_group(self, kernel: Any, shares: int, warps: int, *tensors: torch.Tensor) -> Callable[[int], Any]:
        """What starts a kernel on all sequences' chunks of a group, `shares` programs a chunk and head."""
        place, options = (*self.chunks.tensors[:2], self.T, self.keep), self.options | {"num_warps": warps}
        return partial(kernel[(self.heads * self.keep * shares,)], *tensors, *place, **options)

    def room(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """(S, H, *shape)."""
        return like.new_empty(self.chunks.num_sequences, self.options["H"], *shape)

    def scratch(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """(teams, *shape)."""
        return like.new_empty(self.teams, *shape)


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
