"""The Triton kernels of `ssd` as a torch operator: launches and gradients.

Forward: one walk along the sequences. Nothing but the inputs is saved.
Backward: the walks of the states and of their adjoints; then the gradients, chunk by chunk. What the programs of a
chunk have of one gradient is summed in a fixed order.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

from riverrun.kernels.common.self_check import check_once, deviation
from riverrun.kernels.common.shooting import NAMESPACE
from riverrun.kernels.common.triton_chunks import Chunks, cut
from riverrun.kernels.common.triton_math import INTERPRETED
from riverrun.kernels.ssd.chunked import ssd_chunked
from riverrun.kernels.ssd.triton_backward import gradients_kernel, states_kernel
from riverrun.kernels.ssd.triton_forward import forward_kernel

LARGEST_P, LARGEST_N = 128, 256
CHUNK = 64  # tokens, at most
TILE_NUMBERS = 8192
TILE_P = 64  # channels of a program, at most
FORWARD_WARPS, STATES_WARPS = 4, 4
STATES_REGISTERS = 128  # of a thread, at most: four programs fit a multiprocessor
GRADIENTS_WARPS = {64: 4, 32: 8, 16: 8}  # by the tokens of a chunk
STAGES = 2


def _is_hopper() -> bool:
    """Or newer: matrix products of at least 64 rows, whose operands need no registers."""
    if INTERPRETED.value:
        return True
    return triton.runtime.driver.active.get_current_target().arch >= 90


@dataclass(frozen=True)
class Launch:
    """How the work on x (B, T, H, P) and B (B, T, G, N) is cut."""

    chunks: Chunks
    dims: dict[str, Any]
    tile: int  # numbers of a chunk of B, or of a walker's state, at most
    multiprocessors: int

    @classmethod
    def of(cls, x: torch.Tensor, B: torch.Tensor, cu_seqlens: torch.Tensor | None) -> "Launch":
        (_, T, H, P), (G, N) = x.shape, B.shape[2:]
        BN = max(16, triton.next_power_of_2(N))
        narrow = x.element_size() == 2  # products of float32 are three of narrower numbers
        tile = TILE_NUMBERS if narrow else TILE_NUMBERS // 4
        most = min(CHUNK if narrow and _is_hopper() else CHUNK // 2, tile // BN)
        Q = max(16, min(most, triton.next_power_of_2(T)))
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
        return cls(cut(x, Q, cu_seqlens), {"H": H, "G": G, "P": P, "N": N, "Q": Q, "BN": BN}, tile, multiprocessors)

    @property
    def channels(self) -> int:
        """Of a tile of a head."""
        return max(16, min(TILE_P, triton.next_power_of_2(self.dims["P"])))

    def walk(self) -> tuple[int, int]:
        """The programs that walk along all sequences, and the channels of each: what registers have room for, or fewer
        where that would leave multiprocessors idle."""
        P, walks = self.dims["P"], self.chunks.num_sequences * self.dims["H"]
        channels = max(16, min(self.channels, self.tile // self.dims["BN"]))
        while channels > 16 and walks * triton.cdiv(P, channels) < self.multiprocessors:
            channels //= 2
        return walks * triton.cdiv(P, channels), channels

    @property
    def splits(self) -> int:
        """Of a group's heads, in the gradients: as few as leave no multiprocessor idle."""
        heads = self.dims["H"] // self.dims["G"]
        programs = 2 * self.chunks.num_chunks * self.dims["G"]
        return next((n for n in range(1, heads) if heads % n == 0 and n * programs >= self.multiprocessors), heads)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, T, J, K) → (B·T, J·K) with the numbers of a token side by side: a view where the strides allow it."""
    rows = x.reshape(x.shape[0] * x.shape[1], -1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _strides(x: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> dict[str, int]:
    """From token to token. Constants: as variables they would cost a register for each row of a tile."""
    return {"X_STRIDE": x.stride(0), "B_STRIDE": B.stride(0), "C_STRIDE": C.stride(0)}


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ y (B, T, H, P), final state (S, H, P, N) float32."""
    batch, T, H, P = x.shape
    launch = Launch.of(x, B, cu_seqlens)
    y = x.new_empty(batch, T, H, P)
    final = x.new_empty(launch.chunks.num_sequences, H, P, B.shape[3], dtype=torch.float32)
    x, B, C = map(_rows, (x, B, C))
    programs, channels = launch.walk()
    forward_kernel[(programs,)](
        x, dt, A, B, C, x if D is None else D, final if initial is None else initial, y, final,
        *launch.chunks.tensors[:2], T,
        **launch.dims, **_strides(x, B, C), BP=channels, HAS_D=D is not None,
        BY_CHANNEL=D is not None and D.dim() == 2, HAS_INITIAL=initial is not None, PACKED=launch.chunks.packed,
        STAGES=STAGES, num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return y, final


def scan_backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of x, dt, A, B, C, D and the initial state (those two empty if there is none)."""
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    launch = Launch.of(x, B, cu_seqlens)
    M, splits = launch.chunks.num_chunks, launch.splits
    grad_x = x.new_empty(x.shape)
    x, B, C = map(_rows, (x, B, C))
    dims = launch.dims | _strides(x, B, C)

    programs, channels = launch.walk()

    def walk(
        backward: bool, x: torch.Tensor, B: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None
    ) -> torch.Tensor:
        states = x.new_empty(M, H, N, P)
        states_kernel[(programs,)](
            x, dt, A, B, states if before is None else before, states, states if after is None else after,
            *launch.chunks.tensors[:2], T,
            **launch.dims, X_STRIDE=x.stride(0), B_STRIDE=B.stride(0), BP=channels,
            BACKWARD=backward, HAS_FIRST=before is not None, KEEP_LAST=after is not None,
            PACKED=launch.chunks.packed, STAGES=STAGES,
            num_warps=STATES_WARPS, maxnreg=STATES_REGISTERS,
        )  # fmt: skip
        return states

    grad_initial = None if initial is None else torch.empty_like(initial)
    states = walk(False, x, B, initial, None)
    grad_states = walk(True, _rows(grad_y), C, grad_final, grad_initial)

    grad_dt, grad_A = dt.new_empty(2, batch, T, H), dt.new_zeros(2, M, H)
    grad_B = x.new_empty(splits, batch, T, G, N, dtype=x.dtype if splits == 1 else torch.float32)
    grad_C = dt.new_empty(2 * splits, batch, T, G, N)
    grad_D = dt.new_zeros(0 if D is None else (M, *D.shape))
    size = P * launch.dims["BN"] * TILE_NUMBERS // launch.tile  # of a state
    stages = STAGES - (size > 4 * TILE_NUMBERS)
    gradients_kernel[(2 * M * G * splits,)](
        grad_y, x, dt, A, B, C, x if D is None else D, states, grad_states,
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, *launch.chunks.tensors[2:], T, M, batch * T,
        **dims, BP=launch.channels, HEADS=H // G // splits, HAS_D=D is not None,
        BY_CHANNEL=D is not None and D.dim() == 2, PACKED=launch.chunks.packed,
        READ_STAGES=stages + (size <= TILE_NUMBERS), STAGES=stages,
        num_warps=GRADIENTS_WARPS[launch.dims["Q"]],
    )  # fmt: skip
    grad_B = grad_B[0] if splits == 1 else grad_B.sum(0).to(x.dtype)
    grad_D = grad_D if D is None else grad_D.sum(0)
    grad_C = grad_C.sum(0).to(x.dtype)
    grad_initial = A.new_empty(0) if grad_initial is None else grad_initial
    return grad_x, grad_dt.sum(0), grad_A.sum((0, 1)), grad_B, grad_C, grad_D, grad_initial


@torch.library.custom_op(f"{NAMESPACE}::ssd_triton", mutates_args=())
def _forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return scan(x, dt, A, B, C, D, initial, cu_seqlens)


@_forward.register_fake
def _(x, dt, A, B, C, D, initial, cu_seqlens):
    batch, T, H, P = x.shape
    S = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(batch, T, H, P), x.new_empty(S, H, P, B.shape[3], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::ssd_triton_backward", mutates_args=())
def _backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return scan_backward(grad_y, grad_final, x, dt, A, B, C, D, initial, cu_seqlens)


@_backward.register_fake
def _(grad_y, grad_final, x, dt, A, B, C, D, initial, cu_seqlens):
    return (
        x.new_empty(x.shape), torch.empty_like(dt), torch.empty_like(A), x.new_empty(B.shape), x.new_empty(C.shape),
        A.new_empty(0 if D is None else D.shape), A.new_empty(0 if initial is None else initial.shape),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad_y: torch.Tensor | None, grad_final: torch.Tensor | None) -> tuple[Any, ...]:
    x, dt, A, B, C, D, initial, cu_seqlens = ctx.saved_tensors
    grad_y = x.new_zeros(x.shape) if grad_y is None else grad_y.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    *grads, grad_D, grad_initial = _backward(grad_y, grad_final, x, dt, A, B, C, D, initial, cu_seqlens)
    return *grads, None if D is None else grad_D, None if initial is None else grad_initial, None


_forward.register_autograd(_gradient, setup_context=_setup)


@torch.compiler.assume_constant_result
def check(dtype: torch.dtype, device: torch.device, H: int, P: int, G: int, N: int) -> None:
    """The self-check of kernels for these sizes, also while torch.compile traces the call."""

    def compare() -> float:
        generator = torch.Generator(device).manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        T = 3 * CHUNK + 8  # several chunks, the last one short
        x, B, C = (draw(1, T, J, K).to(dtype) for J, K in ((H, P), (G, N), (G, N)))
        inputs = [x, draw(1, T, H).sigmoid(), -draw(H).exp(), B, C, draw(H), draw(1, H, P, N)]
        outcomes = []
        with torch.enable_grad():
            for form in ("triton", "chunked"):
                leaves = [(t if form == "triton" else t.double()).detach().requires_grad_() for t in inputs]
                x, dt, A, B, C, D, state = leaves
                if form == "triton":
                    out = _forward(x, dt, A, B, C, D, state, None)
                else:
                    out = ssd_chunked(x, dt, A, B, C, D, state, None, CHUNK)
                outcomes.append([*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), leaves)])
        return deviation(*outcomes)

    sizes = {"H": H, "P": P, "G": G, "N": N, "dtype": dtype}
    check_once("ssd", sizes, device, compare, 1e-4 if dtype == torch.float32 else 5e-2)


def ssd_triton(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.ssd.ssd`. The values of `cu_seqlens` are not checked: the host does not wait for them."""
    P, N = x.shape[3], B.shape[3]
    if P > LARGEST_P or N > LARGEST_N:
        raise ValueError(
            f"ssd: the Triton kernels take P up to {LARGEST_P} and N up to {LARGEST_N}, got P={P}, N={N}; use "
            "backend='chunked'"
        )
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(f"cu_seqlens describes documents packed into one row: expected batch size 1, got {x.shape[0]}")
    B, C = B.to(x.dtype), C.to(x.dtype)
    dt, A = dt.float().contiguous(), A.float().contiguous()
    D, initial_state = (t if t is None else t.float().contiguous() for t in (D, initial_state))
    if x.is_cuda:
        check(x.dtype, x.device, *x.shape[2:], *B.shape[2:])
    return _forward(x, dt, A, B, C, D, initial_state, cu_seqlens)
