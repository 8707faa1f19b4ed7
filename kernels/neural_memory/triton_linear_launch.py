"""How the work of a linear memory is cut for its Triton kernels, and their launches."""

from typing import Any, NamedTuple

import torch

from riverrun.kernels.common.triton_chunks import cut
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.gated_delta.triton_launch import tile
from riverrun.kernels.neural_memory.gates import ChunkGates
from riverrun.kernels.neural_memory.triton_linear_gradients import gradients_kernel
from riverrun.kernels.neural_memory.triton_linear_prepare import prepare_kernel
from riverrun.kernels.neural_memory.triton_linear_walk import backward_kernel, forward_kernel
from riverrun.kernels.neural_memory.triton_linear_within import within_kernel

CHUNKS = (16, 32, 64, 128)  # tokens of one
TILE = 64  # channels, at most
ROOM = 64 * 128  # numbers of the states that a program of a walk holds and computes with; twice that if it only writes


class Settings(NamedTuple):
    """What is computed.

    Attributes:
        chunk_size: C, tokens of a chunk.
        online: each token's error is at the weights that it finds, not at those of the chunk's start.
        late: tokens read before they write.
    """

    chunk_size: int
    online: bool
    late: bool


class Pair(NamedTuple):
    """Of the weights, and of the momentum if there is any."""

    weights: torch.Tensor | None
    momentum: torch.Tensor | None


class Made(NamedTuple):
    """What the way forth makes and the way back needs.

    Attributes:
        scores, inverse: −P and T (M, H, C, C); without T the same tensor.
        states, momenta: W and S at the chunks' starts (M, H, K, V), maybe.
        errors: E (B, T, H, V), maybe.
    """

    scores: torch.Tensor
    inverse: torch.Tensor
    states: torch.Tensor | None = None
    momenta: torch.Tensor | None = None
    errors: torch.Tensor | None = None


class Launch:
    """The launches for q, k (B, T, H, K) and v (B, T, H, V)."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: ChunkGates,
        cu_seqlens: torch.Tensor | None,
        settings: Settings,
    ):
        self.q, self.k, self.v, self.gates, self.settings = q, k, v, gates, settings
        self.chunks = cut(q, settings.chunk_size, cu_seqlens)
        self.sizes = q.shape[1], q.shape[2], q.shape[3], v.shape[3]  # T, H, K, V
        self.momentum = gates.carry is not None

    def room(self, save: bool) -> Made:
        """For what the way back needs too, or for what the way forth does."""
        scores = self._square()
        inverse = torch.empty_like(scores) if self.settings.online else scores
        if not save:
            return Made(scores, inverse)
        return Made(scores, inverse, *self._states(self.chunks.num_chunks, self.q.dtype), torch.empty_like(self.v))

    def prepare(self, made: Made) -> None:
        """−P and T."""
        (T, H, K, _), C = self.sizes, self.settings.chunk_size
        prepare_kernel[(self.chunks.num_chunks, H)](
            self.q, self.k, self.gates.weight, made.scores, made.inverse, *self.chunks.tensors[2:], T, K,
            **self._dims(), BK=tile(K, TILE), LEVELS=C.bit_length() - 1, EXACT=self.q.dtype == torch.float32,
        )  # fmt: skip

    def outputs(self, made: Made, initial: Pair) -> tuple[torch.Tensor, Pair]:
        """→ o (B, T, H, V), and the final states (S, H, K, V). Saves what there is room for."""
        o, final = torch.empty_like(self.v), self._states(self.chunks.num_sequences, torch.float32)
        self._forward(made, initial, (o, *final), read=True)
        return o, final

    def states(self, made: Made, initial: Pair) -> None:
        """Saves, and nothing else."""
        self._forward(made, initial, (None, None, None), read=False)

    def _forward(self, made: Made, initial: Pair, outputs: tuple[torch.Tensor | None, ...], *, read: bool) -> None:
        grid, options = self._walk(32 if read else 64, ROOM if read else 2 * ROOM)
        forward_kernel[grid](
            self.q, self.k, self.v, *self._given(*self.gates), *made[:2], *self._given(*initial, *outputs, *made[2:]),
            *self.chunks.tensors[:2], self.sizes[0],
            **options, HAS_MOMENTUM=initial.momentum is not None, READ=read, SAVE=made.errors is not None,
        )  # fmt: skip

    def adjoints(self, made: Made, grad_o: torch.Tensor, grad_final: Pair) -> tuple[Pair, torch.Tensor, Pair]:
        """→ the adjoints of the states at the chunks' ends (M, H, K, V), the gradient of v, and those of the initial
        states (S, H, K, V)."""
        grid, options = self._walk()
        adjoints, grad_v = self._states(self.chunks.num_chunks, self.q.dtype), torch.empty_like(self.v)
        grad_initial = self._states(self.chunks.num_sequences, torch.float32)
        backward_kernel[grid](
            grad_o, *self._given(*grad_final), self.q, self.k, *self._given(*self.gates), *made[:2], grad_v,
            *self._given(*adjoints, *grad_initial), *self.chunks.tensors[:2], self.sizes[0],
            **options, HAS_FINAL=grad_final.weights is not None, HAS_MOMENTUM=grad_final.momentum is not None,
        )  # fmt: skip
        return adjoints, grad_v, grad_initial

    def gradients(
        self, made: Made, grad_o: torch.Tensor, adjoints: Pair, grad_v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ChunkGates]:
        """→ the gradients of q, k and the gates."""
        (T, H, K, V), M, C, online = self.sizes, self.chunks.num_chunks, *self.settings[:2]
        # chunks too many are passed over
        new = self.gates.decay.new_zeros if self.chunks.packed else self.gates.decay.new_empty
        weight, X, Z = new(M, H, C, C), self._square(), self._square() if online else self.q
        within_kernel[(M, H)](
            grad_o, self.q, self.k, self.gates.weight, made.errors, grad_v, weight, X, Z,
            *self.chunks.tensors[2:], T, K, V, **self._options(TILE, TILE) | {"STAGES": 3 if C <= 64 else 2},
        )  # fmt: skip
        decay, last = new(2 if online else 1, M, H, C), new(M, H, C)
        carry, momentum_decay, momentum_weight = None, None, None
        if self.momentum:
            carry, momentum_decay, momentum_weight = new(decay.shape), new(M, H), new(M, H, C)
        grad_q, grad_k, given = torch.empty_like(self.q), torch.empty_like(self.k), self._given(*self.gates)
        gradients_kernel[(2 * M, H)](
            grad_o, self.q, self.k, *given[:3], given[4], *self._given(*made[2:4], *adjoints), made.errors, grad_v,
            X, Z, grad_q, grad_k, decay, last, *self._given(carry, momentum_decay, momentum_weight),
            *self.chunks.tensors[2:], T, M, K, V, **self._tiles_of_gradients(), MOMENTUM=self.momentum,
        )  # fmt: skip
        weight[:, :, -1] += last
        carry = None if carry is None else carry.sum(0)
        return grad_q, grad_k, ChunkGates(decay.sum(0), weight, carry, momentum_decay, momentum_weight)

    def _dims(self) -> dict[str, Any]:
        (_, H, K, _), (C, online, late) = self.sizes, self.settings
        dims = {"H": H, "K": K, "C": C, "LATE": int(late), "ONLINE": online, "PACKED": self.chunks.packed}
        return dims | {"STAGES": 2, "num_warps": 4 if C <= 64 else 8}

    def _options(self, tile_k: int, tile_v: int) -> dict[str, Any]:
        K, V = self.sizes[2:]
        return self._dims() | {"V": V, "BK": tile(K, tile_k), "BV": tile(V, tile_v)}

    def _tiles_of_gradients(self) -> dict[str, Any]:
        C, V = self.settings.chunk_size, self.sizes[3]
        if C <= 64 and V <= 128 and self.q.element_size() == 2:
            return self._options(16, V) | {"BV": power_of_2_from(V), "RESIDENT": True, "STAGES": 3}
        return self._options(32, TILE if C <= 64 else 32) | {"RESIDENT": False}

    def _walk(self, most: int = 32, room: int = ROOM) -> tuple[tuple[int, int], dict[str, Any]]:
        """The programs of a walk, and their options: of at most that many channels, and numbers of the states."""
        _, H, K, V = self.sizes
        options = self._dims()
        rows = 16 * options["num_warps"]  # that Hopper's products have at least: K is padded
        tile_k = rows if rows < K else tile(K, rows)
        num_tiles = ceil_div(K, tile_k)
        states = num_tiles * tile_k * (2 if self.momentum else 1)
        tile_v = tile(V, next((size for size in (64, 32) if size <= most and size * states <= room), 16))
        options |= {"V": V, "BK": tile_k, "NK": num_tiles, "BV": tile_v, "MOMENTUM": self.momentum}
        if self.settings.chunk_size > 64 or self.q.element_size() > 2:
            options["STAGES"] = 1  # shared memory holds no more
        return (self.chunks.num_sequences * H, ceil_div(V, tile_v)), options

    def _given(self, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
        """Any tensor, which is not read, in the place of those that there are not."""
        return [self.q if x is None else x for x in tensors]

    def _square(self) -> torch.Tensor:
        C = self.settings.chunk_size
        return self.q.new_empty(self.chunks.num_chunks, self.sizes[1], C, C)

    def _states(self, count: int, dtype: torch.dtype) -> Pair:
        weights = self.q.new_empty(count, *self.sizes[1:], dtype=dtype)
        return Pair(weights, torch.empty_like(weights) if self.momentum else None)
