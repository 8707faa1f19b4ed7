"""The two-layer memory as a torch operator of Triton kernels.

Forward: one kernel walks over all chunks of all sequences, a head's state spread over a team of programs. For a
backward pass it keeps the states before every g-th chunk, g about the root of the number of chunks, and what was read
before the norm.
Backward: for each group of g chunks, from the last to the first, the same walk makes the states before its chunks
again. Then one kernel does what does not depend on the chunks behind, one walks back, and one does the rest.

Or the forward keeps the states before all chunks, and U and δ₂ with them: then none are made again.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import normalize

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due
from riverrun.kernels.neural_memory.chunked import neural_memory_chunked
from riverrun.kernels.neural_memory.gates import ChunkGates, triton_gates
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Rule, Weights
from riverrun.kernels.neural_memory.triton_mlp_around import after_kernel, before_kernel, output_gradients_kernel
from riverrun.kernels.neural_memory.triton_mlp_back import back_kernel
from riverrun.kernels.neural_memory.triton_mlp_handed import HANDED
from riverrun.kernels.neural_memory.triton_mlp_launch import Launch, as_kernels_take, pack, unpack
from riverrun.kernels.neural_memory.triton_mlp_tiles import TOKENS
from riverrun.kernels.neural_memory.triton_mlp_walk import again_kernel, walk_kernel
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
    o, final, nothing = torch.empty_like(v), torch.empty_like(initial), gates[0]
    saved, C, V = launch.to_save(v, norm_weight, initial), gates[1].shape[-1], v.shape[-1]
    before_norm, states, u, d2 = (x if x.numel() else nothing for x in saved)
    if save != "all":
        d2 = launch.scratch(v, C, V)
    gain = nothing if norm_weight is None else norm_weight
    partial_u, partial_u_q = (launch.scratch(initial, copies, launch.tiles, C, V) for copies in (1, 2))
    launch.of_teams(
        walk_kernel, q, k, v, gain, *gates, initial, final, o, before_norm, states, u, d2, partial_u, partial_u_q,
        SAVE=save != "nothing",
    )()  # fmt: skip
    return o, final, *saved


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
    tiles, keep, gain = launch.tiles, launch.keep, gates[0] if norm_weight is None else norm_weight
    # of packed documents there may be fewer chunks than places for them
    make = partial(torch.zeros if launch.chunks.packed else torch.empty, dtype=torch.float32, device=q.device)
    of_outputs, of_errors = initial.new_zeros(M, H, C // TOKENS.value, V), launch.room(initial, tiles, V).zero_()
    by_u_q = grad_o
    if norm_weight is not None:
        by_u_q = torch.empty_like(v)
        output_gradients_kernel[(M * H * (C // TOKENS.value),)](
            grad_o, before_norm, gain, by_u_q, of_outputs, *launch.chunks.tensors[2:], launch.T,
            H=H, V=V, C=C, WV=launch.options["WV"], PACKED=launch.chunks.packed,
        )  # fmt: skip

    kept, again = states, None
    reads1, weight1, ends1, writes1, reads2, weight2, ends2, writes2 = gates
    if save == "root":
        kept, u, d2 = launch.room(k, keep, P, F * (K + V)), launch.room(initial, keep, C, V), launch.room(k, keep, C, V)
        again = launch.of_teams(
            again_kernel, k, v, gain, weight1, ends1, writes1, ends2, writes2, initial, states, kept, u, d2,
            launch.scratch(initial, tiles, C, V),
        )  # fmt: skip
    adjoint = torch.zeros_like(initial) if grad_final is None else grad_final.clone()
    handed, crossings = launch.room(k, keep, HANDED.value, F, C), launch.room(k, keep, tiles, C, C)
    behind = launch.room(k, keep, P, F * (K + V))
    by_q, by_k, by_v = (torch.empty_like(x) for x in (q, k, v))
    shapes = (M, H, tiles, P, C), (M, H, C, C), (M, H, tiles, ends), (M, H, tiles, P, C)
    by_gates = [make(shape) for shape in shapes * 2]
    by_reads1, by_weight1, by_ends1, by_writes1, by_reads2, by_weight2, by_ends2, by_writes2 = by_gates
    before = launch.of_group(
        before_kernel, tiles, 4, q, k, reads1, weight1, reads2, weight2, kept, d2, by_u_q, handed, crossings, by_reads1,
        by_reads2,
    )  # fmt: skip
    back = launch.of_teams(
        back_kernel, q, k, v, gain, reads1, ends1, writes1, reads2, ends2, writes2, kept, u, d2, by_u_q, handed,
        crossings, behind, adjoint, launch.scratch(k, C, V), launch.scratch(initial, tiles, C, V), by_v, by_writes1,
        by_writes2, of_errors,
    )  # fmt: skip
    after = launch.of_group(
        after_kernel, 1, 8, q, k, reads1, weight1, writes1, kept, d2, grad_o, by_u_q, handed, behind, by_v, by_q, by_k,
        by_weight1, by_weight2, by_ends1, by_ends2,
    )  # fmt: skip
    for start in reversed(launch.groups):
        if again is not None:
            again(start)
        before(start)
        back(start)
        after(start)
    by_gates = [x if x is by_weight1 or x is by_weight2 else x.sum(2) for x in by_gates]
    return [by_q, by_k, by_v, *by_gates, of_outputs.sum((0, 2)) + of_errors.sum((0, 2)), adjoint]


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
