"""The walks of one call of the gated delta rule, of its sequences, or of segments after a walk for their maps."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from riverrun.kernels.gated_delta.triton_launch import STAGES, WARPS, Launch, Prepared, tile
from riverrun.kernels.gated_delta.triton_segments import between_kernel
from riverrun.kernels.gated_delta.triton_walk import backward_kernel, forward_kernel

TILE_K_BETWEEN, TILE_V_BETWEEN = 64, 16  # at most


@dataclass(frozen=True)
class Walks:
    """The walks along the sequences of one call."""

    launch: Launch
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    prepared: Prepared
    forward: bool  # for the outputs, or for gradients: what was prepared, and how exact products are

    def _new(self, count: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        H, K = (self.launch.dims[x] for x in ("H", "K"))
        return self.v.new_empty(count, H, K, columns, dtype=dtype)

    def _parts(self) -> int:
        """Of operands in products. Gradients are rounded to 16 bits, so that two parts hold more than they keep."""
        return (3 if self.forward else 2) if self.launch.exact else 1

    def _options(self) -> dict[str, Any]:
        launch = self.launch
        dims = launch.dims | {"V": self.v.shape[-1], "BV": launch.value_tile}
        return dims | {"PACKED": launch.chunks.packed, "PARTS": self._parts(), "STAGES": STAGES}

    def _forward(self, initial, o, states, W, final, wanted=None, *, output: bool, keep: bool) -> None:
        launch, (T, V) = self.launch, (self.k.shape[1], self.v.shape[-1])
        unused = self.beta
        forward_kernel[launch.walkers(V if output or keep else V + self.k.shape[-1])](
            self.q, self.k, self.v, self.beta, *self.prepared[:-1],
            *(unused if x is None else x for x in (initial, o, states, W, final, wanted)),
            *launch.chunks.tensors[:2], T,
            **self._options(), HAS_INITIAL=initial is not None, FORWARD=self.forward, OUTPUT=output, STATES=keep,
            num_warps=WARPS["forward"],
        )  # fmt: skip

    def _backward(self, grad_o, grad_final, grad_states, Y, grad_initial, wanted=None, *, keep: bool) -> None:
        launch, unused = self.launch, self.beta
        backward_kernel[launch.walkers(self.v.shape[-1])](
            grad_o, unused if grad_final is None else grad_final, self.q, self.k, self.beta, *self.prepared[:-1],
            *(unused if x is None else x for x in (grad_states, Y, grad_initial, wanted)),
            *launch.chunks.tensors[:2], self.k.shape[1],
            **self._options(), HAS_INITIAL=grad_initial is not None, HAS_FINAL=grad_final is not None, STATES=keep,
            num_warps=WARPS["backward"],
        )  # fmt: skip

    def _between(self, maps: torch.Tensor, offset: torch.Tensor, outer: torch.Tensor | None, backward: bool):
        """The states from which segments are walked."""
        assert self.launch.segments is not None
        (H, K), V, first = (self.launch.dims[x] for x in ("H", "K")), self.v.shape[-1], self.launch.segments.first
        states, BK = self._new(len(maps), V), tile(K, TILE_K_BETWEEN)
        BV = tile(V, TILE_V_BETWEEN)
        between_kernel[((len(first) - 1) * H, triton.cdiv(V, BV))](
            maps[..., V:], offset, states if outer is None else outer, states, first,
            H=H, K=K, V=V, TRANSITION_STRIDE=maps.stride(2), OFFSET_STRIDE=offset.stride(2), BK=BK,
            NK=triton.cdiv(K, BK), BV=BV, HAS_OUTER=outer is not None, BACKWARD=backward,
            num_warps=WARPS["between"], num_stages=1,
        )  # fmt: skip
        return states

    def starts(self, initial: torch.Tensor | None, both_ways: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The states from which walks begin, and the maps of the segments, if there are any: of those that another one
        follows, or `both_ways` also of the last ones."""
        segments, V = self.launch.segments, self.v.shape[-1]
        if segments is None:
            return initial, None
        maps = self._new(segments.chunks.num_sequences, V + self.k.shape[-1])
        wanted = segments.inner_end | segments.inner_start if both_ways else segments.inner_end
        self._forward(None, None, None, None, maps, wanted, output=False, keep=False)
        return self._between(maps, maps, initial, backward=False), maps

    def outputs(self, initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """→ o (B, T, H, V) and the final state (S, H, K, V)."""
        (B, T, _, H, _), V = self.k.shape, self.v.shape[-1]
        o, final = self.v.new_empty(B, T, H, V), self._new(self.launch.chunks.num_sequences, V)
        self._forward(self.starts(initial, both_ways=False)[0], o, None, None, final, output=True, keep=False)
        segments = self.launch.segments
        return o, final if segments is None else segments.of_ends(final)

    def states(self, initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """→ the chunks' first states (M, H, K, V), W (like v), from the states where walks begin."""
        states = self._new(self.launch.chunks.num_chunks, self.v.shape[-1], self.launch.inner_type(self.k))
        W = torch.empty_like(self.v, dtype=states.dtype)
        self._forward(initial, None, states, W, None, output=False, keep=True)
        return states, W

    def adjoints(
        self, grad_o: torch.Tensor, grad_final: torch.Tensor | None, maps: torch.Tensor | None, has_initial: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """→ the adjoints of the chunks' last states, Y (like v), and the gradient of the initial state."""
        segments, V = self.launch.segments, self.v.shape[-1]
        if segments is not None:
            assert maps is not None
            offsets = self._new(len(maps), V)
            self._backward(grad_o, None, None, None, offsets, segments.inner_start, keep=False)
            grad_final = self._between(maps, offsets, grad_final, backward=True)
        states = self._new(self.launch.chunks.num_chunks, V, self.launch.inner_type(self.k))
        Y = torch.empty_like(self.v, dtype=states.dtype)
        grad_initial = self._new(self.launch.chunks.num_sequences, V) if has_initial else None
        self._backward(grad_o, grad_final, states, Y, grad_initial, keep=True)
        if segments is not None and grad_initial is not None:
            grad_initial = segments.of_starts(grad_initial)
        return states, Y, grad_initial
