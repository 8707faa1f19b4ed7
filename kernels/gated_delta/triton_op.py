"""The Triton kernels of the gated delta rule as a torch operator.

Forward: `inverse_kernel` and `scores_kernel` over all chunks, then `forward_kernel` along the sequences. Nothing but
the inputs is saved.
Backward: the preparation again; the two walks, which leave the state at each chunk's start, its adjoint at the end,
W and Y; then `gradients_kernel` over all chunks.
Where sequences and heads are too few to fill the device, each walk is of segments, after a walk for their maps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due
from riverrun.kernels.gated_delta.chunked import gated_delta_chunked
from riverrun.kernels.gated_delta.triton_gradients import gradients_kernel
from riverrun.kernels.gated_delta.triton_launch import WARPS, Launch, prepare, tile, tiles
from riverrun.kernels.gated_delta.triton_walks import Walks
from riverrun.kernels.gated_delta.triton_within import within_kernel

TILE_V_OF_GRADIENTS = 64  # at most
STAGES_OF_GRADIENTS = 2

Exchange = Callable[[torch.Tensor], torch.Tensor]  # of states (S, H, K, V) with ranks that share the sequences


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
    enter: Exchange | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ o (B, T, H, V), final state (S, H, K, V) float32.

    Args:
        enter: makes the initial states of the final ones that zeros would have led to.
    """
    launch = Launch.of(k, v, cu_seqlens, exact)
    walks = Walks(launch, q, k, v, beta, prepare(launch, q, k, beta, g, scale, normalise, forward=True), True)
    maps = None
    if enter is not None:
        maps = walks.maps(launch.all_sequences(k))
        initial = enter(walks.ends(maps))
    elif launch.segments is not None:
        maps = walks.maps(launch.segments.inner_end)
    return walks.outputs(walks.starts(initial, maps))


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
    leave: Exchange | None = None,
) -> tuple[torch.Tensor, ...]:
    """→ the gradients of q, k, v, beta and g (float32, empty if there is none), initial state (empty if none).

    Args:
        leave: makes the final states' adjoints of those that zeros would have led to at the initial ones.
    """
    (batch, T, _, H, _), V = k.shape, v.shape[-1]
    launch = Launch.of(k, v, cu_seqlens, exact)
    prepared = prepare(launch, q, k, beta, g, scale, normalise, forward=False)
    walks = Walks(launch, q, k, v, beta, prepared, False)
    segments, maps, offsets = launch.segments, None, None
    if leave is not None:
        every = launch.all_sequences(k)
        maps = None if segments is None else walks.maps(every)
        offsets = walks.adjoint_offsets(grad_o, every)
        grad_final = leave(walks.first_adjoints(maps, offsets))
    elif segments is not None:
        maps = walks.maps(segments.inner_end | segments.inner_start)
        offsets = walks.adjoint_offsets(grad_o, segments.inner_start)
    states, W = walks.states(walks.starts(initial, maps))
    grad_states, Y, grad_initial = walks.adjoints(grad_o, grad_final, maps, offsets, initial is not None)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_beta = torch.empty_like(beta, dtype=torch.float32)
    grad_g = grad_beta.new_empty(0 if g is None else (2, *g.shape))
    _, decay, units, scores, reads, units_q = prepared
    X, Z = (k.new_empty(scores.shape[:2] + rows + scores.shape[3:]) for rows in (scores.shape[2:3], scores.shape[3:]))
    by_G, by_G_q = torch.empty_like(decay), torch.empty_like(reads)
    options = launch.dims | {"V": V, "GATED": g is not None, "PACKED": launch.chunks.packed}
    options |= {"BV": tile(V, TILE_V_OF_GRADIENTS), "STAGES": STAGES_OF_GRADIENTS}
    within_kernel[(launch.chunks.num_chunks, H)](
        grad_o, k, beta, decay, units, scores, units_q, W, Y, grad_v, grad_beta, X, Z, by_G, by_G_q,
        *launch.chunks.tensors[2:], T, V, scale, **options, num_warps=WARPS["within"],
    )  # fmt: skip
    gradients_kernel[(2 * launch.chunks.num_chunks, H)](
        grad_o, q, k, beta, decay, units, reads, units_q, states, grad_states, W, Y, X, Z, by_G, by_G_q,
        grad_q, grad_k, grad_g, *launch.chunks.tensors[2:], T, batch * T, V,
        **options, NORMALISE=normalise, num_warps=WARPS["gradients"],
    )  # fmt: skip
    grad_g, none = grad_g if g is None else grad_g[0] + grad_g[1], grad_beta.new_empty(0)
    return grad_q, grad_k, grad_v, grad_beta, grad_g, none if grad_initial is None else grad_initial


def check(
    k: torch.Tensor, v: torch.Tensor, gated: bool, normalise: bool, states: bool, packed: bool, exact: bool, back: bool
) -> None:
    """The self-check of the forward kernels for such tensors, or of the backward ones. `states` are initial ones, and
    with `back` gradients of final ones."""
    dtype, device, (n, H, K), V = k.dtype, k.device, k.shape[2:], v.shape[-1]

    def compare() -> float:
        draw, chunk = draws(device), tiles().chunk
        T = 16 * (3 * chunk // n // 16 + 1)  # several chunks; like most batches' a multiple of 16: compilers use that
        bounds = torch.tensor([0, 5, T], dtype=torch.int32, device=device) if packed else None
        q_k_v = [draw(1, T, H, K), draw(1, T, n, H, K), draw(1, T, n, H, V)]
        if not normalise:
            q_k_v[:2] = (F.normalize(x, dim=-1) for x in q_k_v[:2])
        inputs: list[Any] = [x.to(dtype) for x in q_k_v]
        inputs += [
            draw(1, T, n, H).sigmoid() * (2 if exact else 1),
            -draw(1, T, H).exp() / 8 if gated else None,
            draw(2 if packed else 1, H, K, V) if states else None,
        ]
        upstream = draw(1, T, H, V).to(dtype)

        def chunked(q, k, v, beta, g, initial):
            return gated_delta_chunked(q, k, v, beta, g, 1.0, normalise, initial, bounds, chunk)

        q, k, v, beta, g, initial = inputs
        rest = 1.0, normalise, initial, bounds, exact
        if not back:
            return deviation(delta(q, k, v, beta, g, *rest), in_double(chunked, inputs, None))
        grads = delta_backward(upstream, None, q, k, v, beta, g, *rest)
        return deviation([x for x in grads if x.numel()], in_double(chunked, inputs, upstream)[2:])

    sizes: dict[str, object] = {"n": n, "H": H, "K": K, "V": V, "gated": gated, "normalised": normalise}
    sizes |= {"states": states, "packed": packed, "exact": exact, "gradients": back, "dtype": dtype}
    check_once("gated_delta", sizes, device, compare, 1e-4 if dtype == torch.float32 else 5e-2)


@operator("gated_delta_triton")
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
    if is_due(k):
        check(k, v, g is not None, normalise, initial is not None, cu_seqlens is not None, exact, back=False)
    return delta(q, k, v, beta, g, scale, normalise, initial, cu_seqlens, exact)


@_forward.register_fake
def _(q, k, v, beta, g, scale, normalise, initial, cu_seqlens, exact):
    (B, T, _, H, K), V = k.shape, v.shape[-1]
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(B, T, H, V), v.new_empty(S, H, K, V, dtype=torch.float32)


@operator("gated_delta_triton_backward")
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
    if is_due(k):
        check(k, v, g is not None, normalise, initial is not None, cu_seqlens is not None, exact, back=True)
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
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    return _forward(*as_kernels_take(q, k, v, beta, g), scale, qk_l2norm, initial_state, cu_seqlens, exact)


def as_kernels_take(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """The same in the types and the order of memory that the kernels read."""
    q, k, v, beta = (x.contiguous() for x in (q, k.to(q.dtype), v.to(q.dtype), beta))
    return q, k, v, beta, None if g is None else g.float().contiguous()
