"""The walks of one call of `ssd`: along its sequences; or, where these are too few to fill a GPU, along segments: once
for what each adds to a state, and again from the states between them (`triton_segments.py`)."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from riverrun.kernels.ssd.triton_backward import states_kernel
from riverrun.kernels.ssd.triton_forward import forward_kernel
from riverrun.kernels.ssd.triton_launch import Launch
from riverrun.kernels.ssd.triton_segments import between_kernel

FORWARD_WARPS, STATES_WARPS = 4, 4
FORWARD_STAGES, STATES_STAGES = 2, 2
STATES_REGISTERS = 128  # of a thread, at most: four programs fit a multiprocessor
BLOCK_BETWEEN, STAGES_BETWEEN = 512, 4


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
    ) -> None:
        """Writes y (B, T, H, P) and the final state (S, H, P, N), of x (B·T, H·P), B and C (B·T, G·N)."""
        segments = self.launch.segments
        if segments is not None:
            initial = self._between(*self._maps(x, B), initial, final, backward=False)
        forward_kernel[(self.launch.walks,)](
            x, *self.steps, B, C, x if D is None else D, final if initial is None else initial, y, final,
            *self.launch.chunks.tensors[:2], self.T,
            **self.options(), X_STRIDE=x.stride(0), B_STRIDE=B.stride(0), C_STRIDE=C.stride(0), BP=self.launch.walkers,
            HAS_D=D is not None, BY_CHANNEL=D is not None and D.dim() == 2, HAS_INITIAL=initial is not None,
            KEEP_FINAL=segments is None, STAGES=FORWARD_STAGES, num_warps=FORWARD_WARPS,
        )  # fmt: skip

    def states(
        self, x: torch.Tensor, B: torch.Tensor, initial: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """→ the states at the chunks' starts (M, H, N, P) in the type of x, and the decays of the segments, if any."""
        decay = None
        if self.launch.segments is not None:
            added, decay = self._maps(x, B)
            initial = self._between(added, decay, initial, None, backward=False)
        return self._chunk_states(x, B, initial, None, backward=False), decay

    def adjoints(
        self,
        grad_y: torch.Tensor,
        C: torch.Tensor,
        grad_final: torch.Tensor | None,
        grad_initial: torch.Tensor | None,
        decay: torch.Tensor | None,
    ) -> torch.Tensor:
        """→ the adjoints of the states at the chunks' ends; writes that of the initial state, if there is one."""
        if decay is not None:
            added = self._new_states(len(decay))
            self._walk(grad_y, C, None, None, added, None, backward=True)
            grad_final = self._between(added, decay, grad_final, grad_initial, backward=True)
            grad_initial = None
        return self._chunk_states(grad_y, C, grad_final, grad_initial, backward=True)

    def adjoint(self, x: torch.Tensor, B: torch.Tensor, grad_y: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """→ the adjoint of the initial state, (S, H, P, N), where that of the final one is zero; nothing in between."""
        segments = self.launch.segments
        found = self._new_states(self.launch.chunks.num_sequences)
        self._walk(grad_y, C, None, None, found, None, backward=True)
        if segments is None:
            return found
        whole = self._new_states(len(segments.first) - 1)
        self._between(found, self._maps(x, B)[1], None, whole, backward=True)
        return whole

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

    def _maps(self, x: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each segment adds to the state (segments, H, P, N), and its decay (segments, H)."""
        added = self._new_states(self.launch.chunks.num_sequences)
        decay = added.new_empty(added.shape[:2])
        self._walk(x, B, None, None, added, decay, backward=False)
        return added, decay

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
        between_kernel[((len(first) - 1) * H * triton.cdiv(P * N, BLOCK_BETWEEN),)](
            added, decay, decay if outer is None else outer, states, decay if last is None else last, first,
            H=H, NUMBERS=P * N, BLOCK=BLOCK_BETWEEN, HAS_OUTER=outer is not None, KEEP_LAST=last is not None,
            BACKWARD=backward, STAGES=STAGES_BETWEEN,
        )  # fmt: skip
        return states
