"""The Triton scan as a torch operator: launches and gradients. The method is told in `triton_kernels.py`."""

from dataclasses import dataclass
from typing import Any

import torch

from riverrun.kernels.common.device import multiprocessors
from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due, rounding
from riverrun.kernels.common.triton_documents import document_starts
from riverrun.kernels.common.whole import ceil_div, power_of_2_from
from riverrun.kernels.diagonal_scan.chunked import diagonal_scan_chunked
from riverrun.kernels.diagonal_scan.triton_kernels import backward_kernel, forward_kernel

STEPS = 8  # tokens of a chunk, and between checkpoints
FULL, OVERFULL = 240, 500  # threads a multiprocessor: when chunks are not needed, and when there are enough of them
MAX_THREADS = 256  # of a program; with more there would be too few registers for each
MAX_CHUNKS = 64


@dataclass(frozen=True)
class Launch:
    """How B rows of T tokens and D channels are cut: programs of `block` channels walk along a row with `chunks` chunks
    of `STEPS` tokens at a time; a thread has two real or one complex channel of a chunk."""

    chunks: int
    block: int
    per_thread: int

    @classmethod
    def of(cls, x: torch.Tensor) -> "Launch":
        """As few chunks as fill the device."""
        B, T, D = x.shape
        processors = multiprocessors(x)
        per_thread = 1 if x.is_complex() else 2
        block = min(64, power_of_2_from(D))
        while block > 16 and B * ceil_div(D, block) < processors:
            block //= 2
        threads = ceil_div(B * D, per_thread)
        if threads >= FULL * processors:
            return cls(1, block, per_thread)
        most = min(MAX_CHUNKS, MAX_THREADS * per_thread // block, ceil_div(T, STEPS))
        enough = max(1, min(OVERFULL * processors // threads, most))
        return cls(1 << (enough.bit_length() - 1), block, per_thread)  # the power of two below

    def options(self, T: int, D: int) -> dict[str, Any]:
        return {
            "C": self.chunks,
            "BD": self.block,
            "U": STEPS,
            "EVEN": T % (self.chunks * STEPS) == 0 and D % self.block == 0,
            "num_warps": max(1, self.chunks * self.block // (32 * self.per_thread)),
        }


def _words(x: torch.Tensor) -> torch.Tensor:
    """Complex numbers as integers of 64 bits, which is how the kernels read and write them."""
    return x.view(torch.int64) if x.is_complex() else x


def _state_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _num_checkpoints(x: torch.Tensor, save: bool) -> int:
    """Before each row's groups of tokens; none where the backward kernel can read h itself."""
    return ceil_div(x.shape[1], STEPS) if save and x.dtype.itemsize < 4 else 0


def scan(
    x: torch.Tensor,
    a: torch.Tensor,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    save: bool,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ h (B, T, D) in the dtype of x, the final states (S, D), checkpoints (B, ⌈T / STEPS⌉, D), of which there are
    none unless `save`, and h is narrower than float32."""
    B, T, D = x.shape
    launch = launch or Launch.of(x)
    words, documents = (x, x) if cu_seqlens is None else document_starts(cu_seqlens, T, STEPS)
    h = torch.empty_like(x)
    final = x.new_empty(B if cu_seqlens is None else len(cu_seqlens) - 1, D, dtype=_state_dtype(x))
    checkpoints = final.new_empty(B, _num_checkpoints(x, save), D)
    forward_kernel[(B * ceil_div(D, launch.block),)](
        *map(_words, (x, a, final if initial is None else initial, words, documents, h, checkpoints, final)), T,
        D=D, K=2 if x.is_complex() else 1,
        CONSTANT=a.dim() == 1, HAS_INITIAL=initial is not None, PACKED=cu_seqlens is not None,
        SAVE=checkpoints.numel() > 0, **launch.options(T, D),
    )  # fmt: skip
    return h, final, checkpoints


def scan_backward(
    grad_h: torch.Tensor,
    grad_final: torch.Tensor | None,
    states: torch.Tensor,
    a: torch.Tensor,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    checkpoints: torch.Tensor,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of x, of a and of the initial state (empty if there is none); `states` are x where there are
    checkpoints, else h."""
    B, T, D = states.shape
    launch = launch or Launch.of(states)
    words, documents = (states, states) if cu_seqlens is None else document_starts(cu_seqlens, T, STEPS)
    grad_x = torch.empty_like(states)
    grad_a = a.new_empty(B, D, dtype=_state_dtype(a)) if a.dim() == 1 else torch.empty_like(a)
    grad_initial = checkpoints.new_empty(0 if initial is None else initial.shape)
    tensors = (
        grad_h, grad_x if grad_final is None else grad_final, states, a, grad_x if initial is None else initial,
        words, documents, checkpoints, grad_x, grad_a, grad_initial,
    )  # fmt: skip
    backward_kernel[(B * ceil_div(D, launch.block),)](
        *map(_words, tensors), T,
        D=D, K=2 if states.is_complex() else 1,
        CONSTANT=a.dim() == 1, HAS_INITIAL=initial is not None, HAS_FINAL=grad_final is not None,
        PACKED=cu_seqlens is not None, SAVED=checkpoints.numel() > 0, **launch.options(T, D),
    )  # fmt: skip
    return grad_x, grad_a.sum(0).to(a.dtype) if a.dim() == 1 else grad_a, grad_initial


def check(x: torch.Tensor, a: torch.Tensor, has_initial: bool, packed: bool, gradients: bool) -> None:
    """The self-check of the kernels for such tensors."""
    launch, D = Launch.of(x), x.shape[2]
    even = launch.options(x.shape[1], D)["EVEN"]

    def compare() -> float:
        draw = draws(x.device)
        T = 3 * launch.chunks * STEPS - (0 if even else 3)  # three blocks
        bounds = [0, 1, 3, T // 2, T]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=x.device) if packed else None
        S = len(bounds) - 1 if packed else 1
        u, upstream = draw(1, T, D, dtype=_state_dtype(x)).to(x.dtype), draw(1, T, D, dtype=_state_dtype(x)).to(x.dtype)
        decay = draw((D,) if a.dim() == 1 else (1, T, D), dtype=_state_dtype(a))
        decay = (decay / (1 + decay.abs())).to(a.dtype)
        initial = draw(S, D, dtype=_state_dtype(x)) if has_initial else None
        h, final, checkpoints = scan(u, decay, initial, cu_seqlens, gradients, launch)
        got = [h, final]
        if gradients:
            states = u if u.dtype.itemsize < 4 else h
            got += scan_backward(upstream, None, states, decay, initial, cu_seqlens, checkpoints, launch)
            got = got if has_initial else got[:-1]

        def chunked(x, a, initial):
            return diagonal_scan_chunked(x, a, x.new_zeros(S, D) if initial is None else initial, cu_seqlens)

        want = in_double(chunked, (u, decay, initial), upstream if gradients else None)
        return deviation(got, want)

    sizes: dict[str, object] = {
        "D": D,
        "chunks": launch.chunks,
        "block": launch.block,
        "even": even,
        "constant": a.dim() == 1,
    }
    sizes |= {"initial": has_initial, "packed": packed, "gradients": gradients, "dtype": x.dtype, "decay": a.dtype}
    check_once("diagonal_scan", sizes, x.device, compare, rounding(x.dtype))


@operator("diagonal_scan_triton")
def _forward(
    x: torch.Tensor, a: torch.Tensor, initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if is_due(x):
        check(x, a, initial is not None, cu_seqlens is not None, save)
    return scan(x, a, initial, cu_seqlens, save)


@_forward.register_fake
def _(x, a, initial, cu_seqlens, save):
    B, _, D = x.shape
    final = x.new_empty(B if cu_seqlens is None else cu_seqlens.shape[0] - 1, D, dtype=_state_dtype(x))
    return torch.empty_like(x), final, final.new_empty(B, _num_checkpoints(x, save), D)


@operator("diagonal_scan_triton_backward")
def _backward(
    grad_h: torch.Tensor,
    grad_final: torch.Tensor | None,
    states: torch.Tensor,
    a: torch.Tensor,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    checkpoints: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return scan_backward(grad_h, grad_final, states, a, initial, cu_seqlens, checkpoints)


@_backward.register_fake
def _(grad_h, grad_final, states, a, initial, cu_seqlens, checkpoints):
    return torch.empty_like(states), torch.empty_like(a), checkpoints.new_empty(0 if initial is None else initial.shape)


def _setup_context(ctx, inputs, output):
    x, a, initial, cu_seqlens, save = inputs
    h, _, checkpoints = output
    assert save, "called without checkpoints, but a gradient is wanted"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if x.dtype.itemsize < 4 else h, a, initial, cu_seqlens, checkpoints)


def _gradient(ctx, grad_h, grad_final, _):
    states, a, initial, cu_seqlens, checkpoints = ctx.saved_tensors
    grad_h = torch.zeros_like(states) if grad_h is None else grad_h.resolve_conj().contiguous()
    grad_final = None if grad_final is None else grad_final.resolve_conj().contiguous()
    grad_x, grad_a, grad_initial = _backward(grad_h, grad_final, states, a, initial, cu_seqlens, checkpoints)
    return grad_x, grad_a, None if initial is None else grad_initial, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def diagonal_scan_triton(
    x: torch.Tensor, a: torch.Tensor, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.diagonal_scan.diagonal_scan`; `initial_state` has the state's dtype.

    The values of `cu_seqlens` are not checked: the host does not wait for them.
    """
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens describes documents packed into one row: expected batch size 1, got {x.shape[0]}"
            )
        cu_seqlens = cu_seqlens.to(x.device).contiguous()
    tensors = [t if t is None else t.resolve_conj().contiguous() for t in (x, a, initial_state)]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _forward(*tensors, cu_seqlens, save)[:2]
