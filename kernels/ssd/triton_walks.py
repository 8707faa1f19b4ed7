"""The walks of one call of `ssd`: along its sequences; or, where these are too few to fill a GPU, along segments: once
for what each adds to a state, and again from the states between them (`triton_segments.py`)."""

from dataclasses import dataclass
from typing import Any

import torch

from riverrun.kernels.common.whole import ceil_div
from riverrun.kernels.ssd.triton_backward import states_kernel
from riverrun.kernels.ssd.triton_forward import forward_kernel
from riverrun.kernels.ssd.triton_launch import Launch
from riverrun.kernels.ssd.triton_segments import between_kernel

FORWARD_WARPS, STATES_WARPS = 4, 4
FORWARD_STAGES, STATES_STAGES = 2, 2
STATES_REGISTERS = 128  # of a thread, at most: four programs fit a multiprocessor
BLOCK_BETWEEN, STAGES_BETWEEN = 512, 4

Maps = tuple[torch.Tensor, torch.Tensor]  # what segments add to a state (segments, H, P, N); their decays (segments, H)


def rows(x: torch.Tensor) -> torch.Tensor:
    """(B, T, …) → (B·T, …), flat, with the numbers of a token side by side: a view where the strides allow it."""
    flat = x.reshape(x.shape[0] * x.shape[1], -1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


@dataclass(frozen=True)
class Walks:
    """
    Attributes:
        steps: Δ and a of all chunks, (M, H, Q) each.
        T: tokens of a row.
    """

    launch: Launch
    steps: tuple[torch.Tensor, torch.Tensor]
    T: int

    def options(self) -> dict[str, Any]:
        """Of all kernels. Strides are constants: as variables they would cost a register for each row of a tile."""
        return self.launch.dims | {"PACKED": self.launch.chunks.packed}

    def _new_states(self, count: int) -> torch.Tensor:
        H, P, N = (self.launch.dims[x] for x in ("H", "P", "N"))
        return self.steps[0].new_empty(count, H, P, N)

    def outputs(
        self,
        x: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        initial: torch.Tensor | None,
        y: torch.Tensor,
        final: torch.Tensor,
        maps: Maps | None,
    ) -> None:
        """Writes y (B, T, H, P) and the final state (S, H, P, N), of x (B·T, H·P), B and C (B·T, G·N)."""
        if maps is not None:
            initial = self._between(*maps, initial, final, backward=False)
        forward_kernel[(self.launch.walks,)](
            x, *self.steps, B, C, x if D is None else D, final if initial is None else initial, y, final,
            *self.launch.chunks.tensors[:2], self.T,
            **self.options(), X_STRIDE=x.stride(0), B_STRIDE=B.stride(0), C_STRIDE=C.stride(0), BP=self.launch.walkers,
            HAS_D=D is not None, BY_CHANNEL=D is not None and D.dim() == 2, HAS_INITIAL=initial is not None,
            KEEP_FINAL=maps is None, STAGES=FORWARD_STAGES, num_warps=FORWARD_WARPS,
        )  # fmt: skip

    def ends(self, x: torch.Tensor, B: torch.Tensor, maps: Maps | None) -> torch.Tensor:
        """→ the final states (S, H, P, N) where the initial ones are zero; nothing in between."""
        return self._ends(x, B, maps, backward=False)

    def first_adjoints(self, grad_y: torch.Tensor, C: torch.Tensor, maps: Maps | None) -> torch.Tensor:
        """→ the adjoints of the initial states (S, H, P, N) where those of the final ones are zero."""
        return self._ends(grad_y, C, maps, backward=True)

    def states(self, x: torch.Tensor, B: torch.Tensor, initial: torch.Tensor | None, maps: Maps | None) -> torch.Tensor:
        """→ the states at the chunks' starts (M, H, N, P) in the type of x."""
        if maps is not None:
            initial = self._between(*maps, initial, None, backward=False)
        return self._chunk_states(x, B, initial, None, backward=False)

    def adjoints(
        self,
        grad_y: torch.Tensor,
        C: torch.Tensor,
        grad_final: torch.Tensor | None,
        grad_initial: torch.Tensor | None,
        maps: Maps | None,
    ) -> torch.Tensor:
        """→ the adjoints of the states at the chunks' ends; writes that of the initial state, if there is one."""
        if maps is not None:
            grad_final = self._between(*maps, grad_final, grad_initial, backward=True)
            grad_initial = None
        return self._chunk_states(grad_y, C, grad_final, grad_initial, backward=True)

    def maps(self, x: torch.Tensor, B: torch.Tensor) -> Maps | None:
        """Of the segments, if there are any."""
        if self.launch.segments is None:
            return None
        added = self._new_states(self.launch.chunks.num_sequences)
        decay = added.new_empty(added.shape[:2])
        self._walk(x, B, None, None, added, decay, backward=False)
        return added, decay

    def adjoint_maps(self, grad_y: torch.Tensor, C: torch.Tensor, maps: Maps | None) -> Maps | None:
        """The same of adjoints."""
        if maps is None:
            return None
        _, decay = maps
        added = self._new_states(len(decay))
        self._walk(grad_y, C, None, None, added, None, backward=True)
        return added, decay

    def _walk(
        self,
        x: torch.Tensor,
        B: torch.Tensor,
        first: torch.Tensor | None,
        states: torch.Tensor | None,
        last: torch.Tensor | None,
        decay: torch.Tensor | None,
        *,
        backward: bool,
    ) -> None:
        registers = STATES_REGISTERS if self.launch.segments is None else None  # there are not four of segments
        states_kernel[(self.launch.walks,)](
            x, *self.steps, B, *(self.steps[0] if t is None else t for t in (first, states, last, decay)),
            *self.launch.chunks.tensors[:2], self.T,
            **self.options(), X_STRIDE=x.stride(0), B_STRIDE=B.stride(0), BP=self.launch.walkers, BACKWARD=backward,
            HAS_FIRST=first is not None, KEEP_STATES=states is not None, KEEP_LAST=last is not None,
            KEEP_DECAY=decay is not None, STAGES=STATES_STAGES, num_warps=STATES_WARPS, maxnreg=registers,
        )  # fmt: skip

    def _chunk_states(
        self, x: torch.Tensor, B: torch.Tensor, first: torch.Tensor | None, last: torch.Tensor | None, *, backward: bool
    ) -> torch.Tensor:
        H, P, N = (self.launch.dims[name] for name in ("H", "P", "N"))
        states = x.new_empty(self.launch.chunks.num_chunks, H, N, P)
        self._walk(x, B, first, states, last, None, backward=backward)
        return states

    def _ends(self, x: torch.Tensor, B: torch.Tensor, maps: Maps | None, *, backward: bool) -> torch.Tensor:
        segments = self.launch.segments
        found = self._new_states(self.launch.chunks.num_sequences if segments is None else len(segments.first) - 1)
        if maps is None:
            self._walk(x, B, None, None, found, None, backward=backward)
        else:
            self._between(*maps, None, found, backward=backward)
        return found

    def _between(
        self,
        added: torch.Tensor,
        decay: torch.Tensor,
        outer: torch.Tensor | None,
        last: torch.Tensor | None,
        *,
        backward: bool,
    ) -> torch.Tensor:
        """→ the states from which segments are walked; writes the ones after all of a sequence's, if wanted."""
        assert self.launch.segments is not None
        first, (_, H, P, N), states = self.launch.segments.first, added.shape, torch.empty_like(added)
        between_kernel[((len(first) - 1) * H * ceil_div(P * N, BLOCK_BETWEEN),)](
            added, decay, decay if outer is None else outer, states, decay if last is None else last, first,
            H=H, NUMBERS=P * N, BLOCK=BLOCK_BETWEEN, HAS_OUTER=outer is not None, KEEP_LAST=last is not None,
            BACKWARD=backward, STAGES=STAGES_BETWEEN,
        )  # fmt: skip
        return states
