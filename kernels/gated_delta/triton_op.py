"""The Triton kernels of the gated delta rule as a torch operator: launches and gradients.

Forward: `inverse_kernel` and `scores_kernel` over all chunks, then `forward_kernel` along the sequences. Nothing but
the inputs is saved.
Backward: the preparation again; the two walks, which leave the state at each chunk's start, its adjoint at the end,
and Y; then `gradients_kernel` over all chunks.
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
from riverrun.kernels.gated_delta.chunked import gated_delta_chunked
from riverrun.kernels.gated_delta.triton_gradients import gradients_kernel
from riverrun.kernels.gated_delta.triton_inverse import inverse_kernel
from riverrun.kernels.gated_delta.triton_scores import scores_kernel
from riverrun.kernels.gated_delta.triton_walk import backward_kernel, forward_kernel

WARPS = {"inverse": 1, "scores": 4, "forward": 4, "backward": 4, "gradients": 8}
STAGES = 2
TILE_K, TILE_V_OF_GRADIENTS = 128, 32  # at most


@dataclass(frozen=True)
class Tiles:
    """Sub-steps of a chunk, and channels of the values that a walk holds, at most."""

    chunk: int
    values: int


HOPPER = Tiles(64, 64)  # whose matrix products take 64 rows from registers, and the rest from shared memory
EARLIER = Tiles(32, 32)


def _tiles() -> Tiles:
    if INTERPRETED:
        return HOPPER
    return HOPPER if triton.runtime.driver.active.get_current_target().arch >= 90 else EARLIER


def _tile(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`, or one that holds all of it if that is below 16."""
    factor = size & -size
    return min(factor, most) if factor >= 16 else max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Launch:
    """How the work on q (B, T, H, K), k (B, T, n, H, K), v (B, T, n, H, V) is cut."""

    chunks: Chunks
    dims: dict[str, Any]
    value_tile: int
    exact: bool

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, exact: bool) -> "Launch":
        (_, T, n, H, K), V = k.shape, v.shape[-1]
        tiles = _tiles()
        size = max(16, min(tiles.chunk, triton.next_power_of_2(T * n)), triton.next_power_of_2(n))
        tokens = size // n
        tile = _tile(K, TILE_K)
        dims = {
            "H": H, "n": n, "K": K, "C": size, "Q": tokens, "QP": max(16, triton.next_power_of_2(tokens)),
            "BK": tile, "NK": triton.cdiv(K, tile),
        }  # fmt: skip
        return cls(cut(k, tokens, cu_seqlens), dims, _tile(V, tiles.values), exact or k.dtype == torch.float32)

    def value_dims(self, V: int) -> dict[str, Any]:
        return {"V": V, "BV": self.value_tile}

    def walkers(self, V: int) -> tuple[int, int]:
        return triton.cdiv(V, self.value_tile), self.chunks.num_sequences * self.dims["H"]

    def inner_type(self, k: torch.Tensor) -> torch.dtype:
        """Of what passes between kernels."""
        return torch.float32 if self.exact else k.dtype


Prepared = tuple[torch.Tensor, ...]


def _prepare(
    launch: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    normalise: bool,
) -> Prepared:
    """→ inverse (M, H, C, C), decay and units (M, H, C), scores (M, H, QP, C), reads (M, H, QP)."""
    M, (H, C, QP) = launch.chunks.num_chunks, (launch.dims[x] for x in ("H", "C", "QP"))
    inverse, scores = (k.new_empty(M, H, rows, C, dtype=launch.inner_type(k)) for rows in (C, QP))
    decay, units = k.new_empty(2, M, H, C, dtype=torch.float32)
    reads = k.new_empty(M, H, QP, dtype=torch.float32)
    inverse_kernel[(M, H)](
        k, beta, beta if g is None else g, inverse, decay, units, *launch.chunks.tensors[2:], k.shape[1],
        **{x: launch.dims[x] for x in ("H", "n", "K", "C", "Q")}, BK=min(32, launch.dims["BK"]),
        NORMALISE=normalise, GATED=g is not None, PACKED=launch.chunks.packed, EXACT=launch.exact,
        num_warps=WARPS["inverse"],
    )  # fmt: skip
    scores_kernel[(M, H)](
        q, k, decay, units, scores, reads, *launch.chunks.tensors[2:], k.shape[1], scale,
        **launch.dims, NORMALISE=normalise, PACKED=launch.chunks.packed, num_warps=WARPS["scores"],
    )  # fmt: skip
    return inverse, decay, units, scores, reads


def _walk(
    launch: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    prepared: Prepared,
    initial: torch.Tensor | None,
    output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ o (B, T, H, V) and the final state (S, H, K, V), or the chunks' first states (M, H, K, V) and K S (like v)."""
    (B, T, _, H, K), V = k.shape, v.shape[-1]
    if output:
        o, final = v.new_empty(B, T, H, V), v.new_empty(launch.chunks.num_sequences, H, K, V, dtype=torch.float32)
        states = KS = o
    else:
        states = v.new_empty(launch.chunks.num_chunks, H, K, V, dtype=launch.inner_type(k))
        KS = torch.empty_like(v, dtype=states.dtype)
        o = final = states
    forward_kernel[launch.walkers(V)](
        q, k, v, beta, *prepared, final if initial is None else initial, o, states, KS, final,
        *launch.chunks.tensors[:2], T,
        **launch.dims, **launch.value_dims(V), HAS_INITIAL=initial is not None,
        PACKED=launch.chunks.packed, OUTPUT=output, EXACT=launch.exact, STAGES=STAGES, num_warps=WARPS["forward"],
    )  # fmt: skip
    return (o, final) if output else (states, KS)


def delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    normalise: bool,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ o (B, T, H, V), final state (S, H, K, V) float32."""
    launch = Launch.of(k, v, cu_seqlens, exact)
    prepared = _prepare(launch, q, k, beta, g, scale, normalise)
    return _walk(launch, q, k, v, beta, prepared, initial, output=True)


def delta_backward(
    grad_o: torch.Tensor,
    grad_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    normalise: bool,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    exact: bool,
) -> tuple[torch.Tensor, ...]:
    """→ the gradients of q, k, v, beta and g (float32, empty if there is none), initial state (empty if none)."""
    (_, T, _, H, _), V = k.shape, v.shape[-1]
    launch = Launch.of(k, v, cu_seqlens, exact)
    prepared = _prepare(launch, q, k, beta, g, scale, normalise)
    states, KS = _walk(launch, q, k, v, beta, prepared, initial, output=False)
    grad_states, Y = torch.empty_like(states), torch.empty_like(v, dtype=states.dtype)
    grad_initial = states.new_empty(0 if initial is None else initial.shape, dtype=torch.float32)
    common = launch.dims | launch.value_dims(V)
    common |= {"PACKED": launch.chunks.packed, "EXACT": launch.exact}
    backward_kernel[launch.walkers(V)](
        grad_o, grad_initial if grad_final is None else grad_final, q, k, beta, *prepared,
        grad_states, Y, grad_initial, *launch.chunks.tensors[:2], T,
        **common, HAS_INITIAL=initial is not None, HAS_FINAL=grad_final is not None, STAGES=STAGES,
        num_warps=WARPS["backward"],
    )  # fmt: skip
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_beta = torch.empty_like(beta, dtype=torch.float32)
    grad_g = grad_beta.new_empty(0 if g is None else g.shape)
    gradients_kernel[(launch.chunks.num_chunks, H)](
        grad_o, q, k, v, beta, *prepared, states, grad_states, KS, Y, grad_q, grad_k, grad_v, grad_beta, grad_g,
        *launch.chunks.tensors[2:], T, scale,
        **common | {"BV": _tile(V, TILE_V_OF_GRADIENTS)}, NORMALISE=normalise, GATED=g is not None,
        num_warps=WARPS["gradients"],
    )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_beta, grad_g, grad_initial


@torch.library.custom_op(f"{NAMESPACE}::gated_delta_triton", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    normalise: bool,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return delta(q, k, v, beta, g, scale, normalise, initial, cu_seqlens, exact)


@_forward.register_fake
def _(q, k, v, beta, g, scale, normalise, initial, cu_seqlens, exact):
    (B, T, _, H, K), V = k.shape, v.shape[-1]
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(B, T, H, V), v.new_empty(S, H, K, V, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::gated_delta_triton_backward", mutates_args=())
def _backward(
    grad_o: torch.Tensor,
    grad_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    normalise: bool,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return delta_backward(  # type: ignore[return-value]
        grad_o, grad_final, q, k, v, beta, g, scale, normalise, initial, cu_seqlens, exact
    )


@_backward.register_fake
def _(grad_o, grad_final, q, k, v, beta, g, scale, normalise, initial, cu_seqlens, exact):
    new = torch.empty_like(beta, dtype=torch.float32)
    return (
        torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), new,
        new.new_empty(0 if g is None else g.shape), new.new_empty(0 if initial is None else initial.shape),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, beta, g, ctx.scale, ctx.normalise, initial, cu_seqlens, ctx.exact = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, g, initial, cu_seqlens)


def _gradient(ctx: Any, grad_o: torch.Tensor | None, grad_final: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, beta, g, initial, cu_seqlens = ctx.saved_tensors
    (B, T, _, H, _), V = k.shape, v.shape[-1]
    grad_o = v.new_zeros(B, T, H, V) if grad_o is None else grad_o.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    *grads, grad_beta, grad_g, grad_initial = _backward(
        grad_o, grad_final, q, k, v, beta, g, ctx.scale, ctx.normalise, initial, cu_seqlens, ctx.exact
    )
    return (
        *grads, grad_beta.to(beta.dtype), None if g is None else grad_g.to(g.dtype),
        None, None, None if initial is None else grad_initial, None, None,
    )  # fmt: skip


_forward.register_autograd(_gradient, setup_context=_setup)


@torch.compiler.assume_constant_result
def check(dtype: torch.dtype, device: torch.device, n: int, H: int, K: int, V: int, exact: bool) -> None:
    """The self-check of kernels for these sizes, also while torch.compile traces the call."""

    def compare() -> float:
        generator = torch.Generator(device).manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        T = 3 * HOPPER.chunk // n + 8  # several chunks, the last one short
        inputs = [draw(1, T, H, K), draw(1, T, n, H, K), draw(1, T, n, H, V)]
        inputs = [x.to(dtype) for x in inputs]
        inputs += [draw(1, T, n, H).sigmoid() * (2 if exact else 1), -draw(1, T, H).exp() / 8, draw(1, H, K, V)]
        outcomes = []
        with torch.enable_grad():
            for form in ("triton", "chunked"):
                leaves = [(x if form == "triton" else x.double()).detach().requires_grad_() for x in inputs]
                q, k, v, beta, g, state = leaves
                if form == "triton":
                    out = _forward(q, k, v, beta, g, 1.0, True, state, None, exact)
                else:
                    out = gated_delta_chunked(q, k, v, beta, g, 1.0, True, state, None, HOPPER.chunk)
                outcomes.append([*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), leaves)])
        return deviation(*outcomes)

    sizes = {"n": n, "H": H, "K": K, "V": V, "exact": exact, "dtype": dtype}
    check_once("gated_delta", sizes, device, compare, 1e-4 if dtype == torch.float32 else 5e-2)


def gated_delta_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    qk_l2norm: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`riverrun.kernels.gated_delta.gated_delta`; `exact`: β may exceed 1. The values of `cu_seqlens` are not checked:
    the host does not wait for them."""
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens describes documents packed into one row: expected batch size 1, got {q.shape[0]}")
    q, k, v, beta = (x.contiguous() for x in (q, k.to(q.dtype), v.to(q.dtype), beta))
    g, initial_state = (None if x is None else x.float().contiguous() for x in (g, initial_state))
    if q.is_cuda:
        check(q.dtype, q.device, *k.shape[2:], v.shape[-1], exact)
    return _forward(q, k, v, beta, g, scale, qk_l2norm, initial_state, cu_seqlens, exact)
