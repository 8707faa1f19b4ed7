"""The two-layer memory as a torch operator of Triton kernels.

Forward: step by step over the chunks of all sequences. For a backward pass it keeps the states before every g-th chunk,
g about the root of the number of chunks, and what was read before the norm.
Backward: for each group of g chunks, from the last to the first, the same steps make the states before its chunks
again, and others go back over them.

Or the forward keeps the states before all chunks, and U and δ₂ with them: then the backward only goes back.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import normalize

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due
from riverrun.kernels.neural_memory.chunked import neural_memory_chunked
from riverrun.kernels.neural_memory.gates import ChunkGates, triton_gates
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Rule, Weights
from riverrun.kernels.neural_memory.triton_mlp_backward import (
    error_gradients_kernel,
    output_gradients_kernel,
    reads_kernel,
    update_kernel,
)
from riverrun.kernels.neural_memory.triton_mlp_forward import enter_kernel, error_kernel, step_kernel
from riverrun.kernels.neural_memory.triton_mlp_launch import Launch, as_kernels_take, pack, unpack
from riverrun.kernels.neural_memory.triton_path import MLP_CHUNKS, MLP_MOST_HIDDEN, Keep

Tensors = Sequence[torch.Tensor]
SIZES = (32, 64, 96, 128)  # of keys and values; `triton_path.py` leaves out what was seen to go wrong on a GPU


def walk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Tensors,
    norm_weight: torch.Tensor | None,
    initial: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    silu: bool,
    residual: bool,
    save: str,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ o (B, T, H, V), the final state (S, H, P, F (K + V)); and what a backward pass needs (`Launch.to_save`)."""
    launch = Launch.of(k, v, gates[1], norm_weight, initial, cu_seqlens, silu, residual, save, max_seqlen)
    o, state, nothing = torch.empty_like(v), initial.clone(), gates[0]
    saved, C, V = launch.to_save(v, norm_weight, initial), gates[1].shape[-1], v.shape[-1]
    before_norm, states, u, d2 = (x if x.numel() else nothing for x in saved)
    if save == "all":
        checkpoints, kept = nothing, states
    else:
        checkpoints, kept, d2 = states, nothing, launch.room(v, C, V)
    partial_u, partial_u_q = (launch.room(initial, launch.tiles, C, V) for _ in range(2))
    gain = nothing if norm_weight is None else norm_weight
    enter = launch.of_chunk(enter_kernel, launch.tiles, k, checkpoints, state, partial_u)
    error = launch.of_chunk(
        error_kernel, launch.blocks, q, k, v, gain, partial_u, partial_u_q, o, before_norm, u, d2,
        SAVE=save != "nothing", AGAIN=False,
    )  # fmt: skip
    step = launch.of_chunk(
        step_kernel, launch.tiles, q, k, *gates, d2, checkpoints, state, kept, partial_u, partial_u_q, AGAIN=False
    )
    enter(0)
    for number in range(launch.longest):
        error(number)
        step(number)
    error(launch.longest)
    return o, state, *saved


def _again(
    launch: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Tensors,
    gain: torch.Tensor,
    initial: torch.Tensor,
    checkpoints: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Callable[[int], None]]:
    """→ room for a group's states (S, H, g, P, F (K + V)), U and δ₂ (S, H, g, C, V); and what makes them again, of the
    group that begins with a given chunk."""
    keep, C, V, nothing = launch.keep, gates[1].shape[-1], v.shape[-1], gates[0]
    state, partial_u = torch.empty_like(initial), launch.room(initial, launch.tiles, C, V)
    kept, u, d2 = launch.room(k, keep, *initial.shape[2:]), launch.room(initial, keep, C, V), launch.room(k, keep, C, V)
    enter = launch.of_chunk(enter_kernel, launch.tiles, k, checkpoints, state, partial_u)
    error = launch.of_chunk(
        error_kernel, launch.blocks, q, k, v, gain, partial_u, nothing, nothing, nothing, u, d2, SAVE=False, AGAIN=True
    )
    step = launch.of_chunk(
        step_kernel, launch.tiles, q, k, *gates, d2, checkpoints, state, kept, partial_u, nothing, AGAIN=True
    )

    def make(group: int) -> None:
        if group == 0:
            state.copy_(initial)
        enter(group)
        for number in range(launch.longest)[group : group + keep]:
            error(number)
            step(number)

    return kept, u, d2, make


def walk_back(
    grad_o: torch.Tensor,
    grad_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Tensors,
    norm_weight: torch.Tensor | None,
    initial: torch.Tensor,
    before_norm: torch.Tensor,
    states: torch.Tensor,
    u: torch.Tensor,
    d2: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    silu: bool,
    residual: bool,
    save: str,
    max_seqlen: int,
) -> list[torch.Tensor]:
    """→ the gradients of q, k, v, the eight gates, norm_weight (H, V) (zeros without one) and the initial state."""
    launch = Launch.of(k, v, gates[1], norm_weight, initial, cu_seqlens, silu, residual, save, max_seqlen)
    (M, H, P, C), ends, (F, K, V) = gates[0].shape, gates[2].shape[-1], (launch.options[name] for name in "FKV")
    tiles, gain = launch.tiles, gates[0] if norm_weight is None else norm_weight
    # of packed documents there may be fewer chunks than places for them
    make = partial(torch.zeros if launch.chunks.packed else torch.empty, dtype=torch.float32, device=q.device)
    by_gain = initial.new_zeros(M, H, launch.blocks, V)
    if norm_weight is None:
        by_u_q = grad_o
    else:
        by_u_q = torch.empty_like(v)
        output_gradients_kernel[(M * H * launch.blocks,)](
            grad_o, before_norm, gain, by_u_q, by_gain, *launch.chunks.tensors[2:], launch.T,
            H=H, V=V, C=C, WV=launch.options["WV"], PACKED=launch.chunks.packed,
        )  # fmt: skip

    kept, make_again = states, None
    if save == "root":
        kept, u, d2, make_again = _again(launch, q, k, v, gates, gain, initial, states)
    adjoint = torch.zeros_like(initial) if grad_final is None else grad_final.clone()
    passed, by_u = launch.room(k, 7, F, C), launch.room(k, C, V)
    partial_d2, partial_q, partial_k, *partial_weights = (
        launch.room(initial, tiles, C, size) for size in (V, K, K, C, C)
    )
    by_q, by_k, by_v = (torch.empty_like(x) for x in (q, k, v))
    shapes = (M, H, tiles, P, C), (M, H, C, C), (M, H, tiles, ends), (M, H, tiles, P, C)
    by_gates = reads1, weight1, ends1, writes1, reads2, weight2, ends2, writes2 = [make(shape) for shape in shapes * 2]
    reads = launch.of_chunk(
        reads_kernel, tiles, q, k, *gates[:2], *gates[3:6], gates[7], kept, d2, by_u_q, adjoint, passed, partial_d2,
        partial_weights[1], reads2, writes1, writes2,
    )  # fmt: skip
    error_gradients = launch.of_chunk(
        error_gradients_kernel, launch.blocks, grad_o, k, v, gain, u, partial_d2, partial_q, partial_k,
        *partial_weights, by_u, by_gain, by_q, by_k, by_v, weight1, weight2,
    )  # fmt: skip
    update = launch.of_chunk(
        update_kernel, tiles, q, k, *gates[:5], gates[6], kept, d2, by_u_q, by_u, adjoint, passed, partial_q, partial_k,
        partial_weights[0], reads1, ends1, ends2,
    )  # fmt: skip

    chunks = range(launch.longest)
    for group in reversed(chunks[:: launch.keep]):
        if make_again is not None:
            make_again(group)
        for number in reversed(chunks[group : group + launch.keep]):
            reads(number)
            error_gradients(number)
            update(number)
    error_gradients(-1)
    by_gates = [x if x is weight1 or x is weight2 else x.sum(2) for x in by_gates]
    return [by_q, by_k, by_v, *by_gates, by_gain.sum((0, 2)), adjoint]


def check(
    q: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    initial: torch.Tensor,
    packed: bool,
    silu: bool,
    residual: bool,
    save: str,
    back: bool,
) -> None:
    """The self-check of the forward kernels for such tensors, or of the backward ones. Those that save nothing are the
    ones that save "root", but for what they leave out."""
    save = "all" if save == "all" else "root"
    dtype, device, (H, K), V = q.dtype, q.device, q.shape[2:], v.shape[-1]
    F, P, C, norm = initial.shape[-1] // (K + V), initial.shape[2], weight.shape[-1], norm_weight is not None
    rule = Rule(chunk_size=C, activation="silu" if silu else "gelu", residual=residual)

    def compare() -> float:
        draw, T = draws(device), 5 * C + 16  # several groups of chunks
        bounds = torch.tensor([0, 5, T], dtype=torch.int32, device=device) if packed else None
        inputs = [*(normalize(draw(1, T, H, K), dim=-1).to(dtype) for _ in range(2)), draw(1, T, H, V).to(dtype)]
        for _ in range(2):  # small steps, so that no errors grow; weights that last, for norms divide by what they give
            log_keep, lr, log_momentum = -draw(1, T, H).exp() / 256, draw(1, T, H).sigmoid() / F, -draw(1, T, H).exp()
            inputs += [log_keep, lr, log_momentum][: 1 + P]
        for scale in (1, 1 / 8)[:P]:
            layers = draw(1 + packed, H, K, F), draw(1 + packed, H, F, V) * F**-0.5
            inputs += [scale * x for x in layers]
        inputs += [1 + draw(H, V) / 8] * norm
        upstream = draw(1, T, H, V).to(dtype)

        def sort(tensors: Tensors) -> tuple[tuple[Gates, Gates], Weights, Weights | None, torch.Tensor | None]:
            """The gates, the weights, their momentum, and the gain."""
            first, second, rest = tensors[3 : 4 + P], tensors[4 + P : 5 + 2 * P], tuple(tensors[5 + 2 * P :])
            return (Gates(*first), Gates(*second)), rest[:2], rest[2:4] if P == 2 else None, rest[-1] if norm else None

        def chunked(*tensors: torch.Tensor) -> Tensors:
            (q, k, v), (gates, weights, momentum, gain) = tensors[:3], sort(tensors)
            state, nothing = MemoryState(weights, momentum, weights), (None, None, None)
            o, final = neural_memory_chunked(q, k, v, state, gates, rule, gain, *nothing, bounds)
            return [o, *final.weights, *(final.momentum or ())]

        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            gates, weights, momentum, gain = sort(leaves)
            of_chunks = [as_kernels_take(triton_gates(layer, C, bounds), "after") for layer in gates]
            prepared = [*leaves[:3], *of_chunks[0], *of_chunks[1], pack(weights, momentum, P)]
        q, k, v, *rest, initial = (x.detach() for x in prepared)
        gain, options = inputs[-1] if norm else None, (bounds, silu, residual, save, T)
        o, final, before_norm, states, u, d2 = walk(q, k, v, rest, gain, initial, *options)
        if not back:
            return deviation([o, *itertools.chain(*unpack(final, K, V))], in_double(chunked, inputs, None))
        saved = before_norm, states, u, d2, *options
        *grads, by_gain, by_initial = walk_back(upstream, None, q, k, v, rest, gain, initial, *saved)
        got = list(torch.autograd.grad(prepared, leaves[: len(leaves) - norm], [*grads, by_initial]))
        return deviation(got + [by_gain] * norm, in_double(chunked, inputs, upstream)[1 + 2 * P :])

    sizes: dict[str, object] = {"H": H, "K": K, "F": F, "V": V, "chunk": C, "momentum": P == 2, "norm": norm}
    sizes |= {"residual": residual, "silu": silu, "packed": packed, "dtype": dtype}
    sizes |= {"states": save, "gradients": back}
    check_once("neural_memory_mlp", sizes, device, compare, 1e-4 if dtype == torch.float32 else 5e-2)


@operator("neural_memory_mlp_triton")
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    reads1: torch.Tensor,
    weight1: torch.Tensor,
    ends1: torch.Tensor,
    writes1: torch.Tensor,
    reads2: torch.Tensor,
    weight2: torch.Tensor,
    ends2: torch.Tensor,
    writes2: torch.Tensor,
    norm_weight: torch.Tensor | None,
    initial: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    silu: bool,
    residual: bool,
    save: str,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if is_due(q):
        check(q, v, weight1, norm_weight, initial, cu_seqlens is not None, silu, residual, save, back=False)
    gates = (reads1, weight1, ends1, writes1, reads2, weight2, ends2, writes2)
    return walk(q, k, v, gates, norm_weight, initial, cu_seqlens, silu, residual, save, max_seqlen)


@_forward.register_fake
def _(q, k, v, r1, weight, e1, w1, r2, g2, e2, w2, norm_weight, initial, cu_seqlens, silu, residual, save, max_seqlen):
    launch = Launch.of(k, v, weight, norm_weight, initial, cu_seqlens, silu, residual, save, max_seqlen)
    return torch.empty_like(v), torch.empty_like(initial), *launch.to_save(v, norm_weight, initial)


@operator("neural_memory_mlp_triton_backward")
def _backward(
    grad_o: torch.Tensor,
    grad_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    reads1: torch.Tensor,
    weight1: torch.Tensor,
    ends1: torch.Tensor,
    writes1: torch.Tensor,
    reads2: torch.Tensor,
    weight2: torch.Tensor,
    ends2: torch.Tensor,
    writes2: torch.Tensor,
    norm_weight: torch.Tensor | None,
    initial: torch.Tensor,
    before_norm: torch.Tensor,
    states: torch.Tensor,
    u: torch.Tensor,
    d2: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    silu: bool,
    residual: bool,
    save: str,
    max_seqlen: int,
) -> list[torch.Tensor]:
    if is_due(q):
        check(q, v, weight1, norm_weight, initial, cu_seqlens is not None, silu, residual, save, back=True)
    gates = (reads1, weight1, ends1, writes1, reads2, weight2, ends2, writes2)
    return walk_back(
        grad_o, grad_final, q, k, v, gates, norm_weight, initial, before_norm, states, u, d2, cu_seqlens, silu,
        residual, save, max_seqlen,
    )  # fmt: skip


@_backward.register_fake
def _(grad_o, grad_final, q, k, v, r1, g1, e1, w1, r2, g2, e2, w2, norm_weight, initial, *rest):
    by_norm = initial.new_empty(v.shape[2:])
    return [*map(torch.empty_like, (q, k, v, r1, g1, e1, w1, r2, g2, e2, w2)), by_norm, torch.empty_like(initial)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, cu_seqlens, silu, residual, save, max_seqlen = inputs
    assert save != "nothing", "what a backward pass needs was not kept"
    ctx.options = silu, residual, save, max_seqlen
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:], cu_seqlens)


def _gradient(ctx: Any, grad_o: torch.Tensor | None, grad_final: torch.Tensor | None, *unused: Any) -> tuple[Any, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    v, norm_weight = tensors[2], tensors[11]
    grad_o = torch.zeros_like(v) if grad_o is None else grad_o.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    *grads, by_norm, by_initial = _backward(grad_o, grad_final, *tensors, cu_seqlens, *ctx.options)
    by_norm = None if norm_weight is None else by_norm.to(norm_weight.dtype)
    return *grads, by_norm, by_initial, None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup)


def mlp_memory_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: tuple[ChunkGates, ChunkGates],
    norm_weight: torch.Tensor | None,
    initial: Weights,
    initial_momentum: Weights | None,
    cu_seqlens: torch.Tensor | None,
    *,
    chunk_size: int,
    activation: Literal["gelu", "silu"],
    residual: bool,
    read: Literal["after", "before"],
    keep: Keep = "root",
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, Weights, Weights | None]:
    """A memory of two layers whose gradients are taken at the weights before each chunk's first token.

    Args:
        q, k: (B, T, H, K), queries and keys.
        v: (B, T, H, V), values; V = K if `residual`.
        gates: of both layers, of chunks as `triton_gates` counts them; the same one twice if they share it.
        norm_weight: (H, V), the gain of a LayerNorm of the second layer's outputs; None: no norm.
        initial: (S, H, K, F) and (S, H, F, V), the weights before the S sequences.
        initial_momentum: likewise; None: zeros, or there is none.
        cu_seqlens: (S + 1,) bounds of documents packed into one row. Its values are not checked: the host does not wait
            for them.
        chunk_size: 16, 32 or 64.
        read: a token reads the memory "after" it has written to it, or "before".
        keep: the states that a backward pass finds: "root", those before every √n-th chunk, or "all".
        max_seqlen: no document has more tokens, which is not checked either; None: T.

    Returns:
        o (B, T, H, V) in the dtype of q, the final weights and, with momentum, the final momentum, in float32.
    """
    (B, T, _, K), V, F = q.shape, v.shape[-1], initial[0].shape[-1]
    max_seqlen = T if max_seqlen is None or cu_seqlens is None else min(max_seqlen, T)
    if K not in SIZES or V not in SIZES or F % 32 or F > MLP_MOST_HIDDEN:
        raise ValueError(
            f"the Triton kernels of a two-layer memory take K and V of 32, 64, 96 or 128 and a multiple of 32 up to "
            f"{MLP_MOST_HIDDEN} hidden channels, got K={K}, V={V} and {F}: use backend='chunked'"
        )
    if chunk_size not in MLP_CHUNKS:
        raise ValueError(f"the Triton kernels of a two-layer memory take chunks of 16, 32 or 64, got {chunk_size}")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"cu_seqlens describes documents packed into one row: expected batch size 1, got {B}")
    assert gates[0].weight.shape[-1] == chunk_size
    first = as_kernels_take(gates[0], read)
    second = first if gates[1] is gates[0] else as_kernels_take(gates[1], read)
    q, k, v = (x.to(q.dtype).contiguous() for x in (q, k, v))
    state = pack(initial, initial_momentum, 1 if gates[0].carry is None else 2)
    tensors = (q, k, v, *first, *second, None if norm_weight is None else norm_weight.contiguous(), state)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    save = keep if wanted else "nothing"
    o, final, *_ = _forward(*tensors, cu_seqlens, activation == "silu", residual, save, max_seqlen)
    weights, *momentum = unpack(final, K, V)
    return o, weights, momentum[0] if momentum else None
