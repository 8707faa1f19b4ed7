"""The walks of one call of the gated delta rule, of its sequences, or of segments after a walk for their maps."""

from dataclasses import dataclass
from typing import Any

import torch

from riverrun.kernels.common.whole import ceil_div
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

    def _between(
        self,
        maps: torch.Tensor,
        offset: torch.Tensor,
        outer: torch.Tensor | None,
        last: torch.Tensor | None,
        *,
        backward: bool,
    ) -> torch.Tensor:
        """→ the states from which segments are walked; writes the ones after all of a sequence's, if wanted."""
        assert self.launch.segments is not None
        (H, K), V, first = (self.launch.dims[x] for x in ("H", "K")), self.v.shape[-1], self.launch.segments.first
        states, BK = self._new(len(maps), V), tile(K, TILE_K_BETWEEN)
        BV = tile(V, TILE_V_BETWEEN)
        between_kernel[((len(first) - 1) * H, ceil_div(V, BV))](
            maps[..., V:], offset, *(states if x is None else x for x in (outer, states, last)), first,
            H=H, K=K, V=V, TRANSITION_STRIDE=maps.stride(2), OFFSET_STRIDE=offset.stride(2), BK=BK,
            NK=ceil_div(K, BK), BV=BV, HAS_OUTER=outer is not None, KEEP_LAST=last is not None, BACKWARD=backward,
            num_warps=WARPS["between"], num_stages=1,
        )  # fmt: skip
        return states

    def maps(self, wanted: torch.Tensor) -> torch.Tensor:
        """U and M side by side (segments, H, K, V + K), of those `wanted`; or of sequences, where these are not cut."""
        maps = self._new(len(wanted), self.v.shape[-1] + self.k.shape[-1])
        self._forward(None, None, None, None, maps, wanted, output=False, keep=False)
        return maps

    def adjoint_offsets(self, grad_o: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """W (segments, H, K, V): the adjoint of the state at the start where that at the end is zero."""
        offsets = self._new(len(wanted), self.v.shape[-1])
        self._backward(grad_o, None, None, None, offsets, wanted, keep=False)
        return offsets

    def ends(self, maps: torch.Tensor) -> torch.Tensor:
        """→ the final states (S, H, K, V) where the initial ones are zero."""
        offsets = maps[..., : self.v.shape[-1]]
        return self._ends(maps, offsets, backward=False)

    def first_adjoints(self, maps: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
        """→ the adjoints of the initial states (S, H, K, V) where those of the final ones are zero."""
        return self._ends(maps, offsets, backward=True)

    def _ends(self, maps: torch.Tensor | None, offsets: torch.Tensor, *, backward: bool) -> torch.Tensor:
        if self.launch.segments is None:
            return offsets.contiguous()
        assert maps is not None
        last = self._new(len(self.launch.segments.first) - 1, self.v.shape[-1])
        self._between(maps, offsets, None, last, backward=backward)
        return last

    def starts(self, initial: torch.Tensor | None, maps: torch.Tensor | None) -> torch.Tensor | None:
        """The states from which walks begin."""
        if self.launch.segments is None:
            return initial
        assert maps is not None
        return self._between(maps, maps, initial, None, backward=False)

    def outputs(self, starts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """→ o (B, T, H, V) and the final state (S, H, K, V)."""
        (B, T, _, H, _), V = self.k.shape, self.v.shape[-1]
        o, final = self.v.new_empty(B, T, H, V), self._new(self.launch.chunks.num_sequences, V)
        self._forward(starts, o, None, None, final, output=True, keep=False)
        segments = self.launch.segments
        return o, final if segments is None else segments.of_ends(final)

    def states(self, starts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """→ the chunks' first states (M, H, K, V), W (like v)."""
        states = self._new(self.launch.chunks.num_chunks, self.v.shape[-1], self.launch.inner_type(self.k))
        W = torch.empty_like(self.v, dtype=states.dtype)
        self._forward(starts, None, states, W, None, output=False, keep=True)
        return states, W

    def adjoints(
        self,
        grad_o: torch.Tensor,
        grad_final: torch.Tensor | None,
        maps: torch.Tensor | None,
        offsets: torch.Tensor | None,
        has_initial: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """→ the adjoints of the chunks' last states, Y (like v), and the gradient of the initial state."""
        segments, V = self.launch.segments, self.v.shape[-1]
        if segments is not None:
            assert maps is not None and offsets is not None
            grad_final = self._between(maps, offsets, grad_final, None, backward=True)
        states = self._new(self.launch.chunks.num_chunks, V, self.launch.inner_type(self.k))
        Y = torch.empty_like(self.v, dtype=states.dtype)
        grad_initial = self._new(self.launch.chunks.num_sequences, V) if has_initial else None
        self._backward(grad_o, grad_final, states, Y, grad_initial, keep=True)
        if segments is not None and grad_initial is not None:
            grad_initial = segments.of_starts(grad_initial)
        return states, Y, grad_initial
