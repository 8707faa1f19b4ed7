"""Which memories have Triton kernels, and how they are called; what they leave over, chunked torch does."""

from functools import partial
from typing import Literal

import torch

from riverrun.kernels.common.memory_rule import Rule
from riverrun.kernels.neural_memory.chunked import ONLINE_CHUNK, is_exact_online, neural_memory_chunked
from riverrun.kernels.neural_memory.long_chunks import neural_memory_long
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Weights

Kind = Literal["linear", "two layers", "long"]
Keep = Literal["root", "all"]

LINEAR_CHUNKS, LINEAR_MOST = (16, 32, 64, 128), 256
MLP_CHUNKS, MLP_SIZES = (16, 32, 64), (64, 96, 128)
MLP_HIDDEN, MLP_MOST_HIDDEN = 128, 1024  # hidden channels: a multiple of what was run on Hopper


def kind_of(
    weights: Weights, gates: tuple[Gates, ...], rule: Rule, norm_weight: torch.Tensor | None, packed: bool
) -> Kind | None:
    """Of the kernels for such a memory; None: there are none."""
    plain = rule.retention == "none" and rule.window == 1 and not rule.newton_schulz
    if not plain or any(x is not None and x.dim() == 4 for layer in gates for x in layer):
        return None
    K, V = weights[0].shape[-2], weights[-1].shape[-1]
    if rule.read == "chunk" and rule.gated:  # states are kept at all chunks' starts: they should be few
        fits = norm_weight is None and not rule.residual and not packed and rule.bias in ("l2", "dot")
        return "long" if fits and rule.chunk_size >= max(K, V, weights[0].shape[-1]) else None
    if rule.bias != "l2" or rule.gated or rule.read == "chunk":
        return None
    if len(weights) == 1:
        fits = norm_weight is None and not rule.residual and max(K, V) <= LINEAR_MOST
        return "linear" if fits and rule.chunk_size in (1, *LINEAR_CHUNKS) else None
    F = weights[0].shape[-1]
    fits = len(weights) == 2 and K in MLP_SIZES and V in MLP_SIZES and F % MLP_HIDDEN == 0 and F <= MLP_MOST_HIDDEN
    return "two layers" if fits and rule.chunk_size in MLP_CHUNKS else None


def linear_chunk_of(tokens: int) -> int:
    """The least chunk that linear memories' kernels have, with room for the tokens; the largest if none has."""
    return next((size for size in LINEAR_CHUNKS if size >= tokens), LINEAR_CHUNKS[-1])


def neural_memory_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: MemoryState,
    gates: tuple[Gates, ...],
    rule: Rule,
    norm_weight: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    resumable: bool,
    keep: Keep,
) -> tuple[torch.Tensor, MemoryState]:
    """`riverrun.kernels.neural_memory.neural_memory` of memories that have a `kind_of`, whose sequences begin a chunk.

    The kernels do not say where the last chunk began. If that is needed, they take whole chunks, and torch the rest.
    """
    if rule.read == "chunk":
        return neural_memory_long(q, k, v, state, gates, rule, resumable)
    T = q.shape[1]
    online = is_exact_online(rule, len(gates), norm_weight)
    whole = T if online or not resumable else T - T % rule.chunk_size
    if whole == T:
        return _run(q, k, v, state, gates, rule, norm_weight, cu_seqlens, max_seqlen, keep)
    assert cu_seqlens is None

    def part(x: torch.Tensor, tokens: slice) -> torch.Tensor:
        return x[:, tokens]

    outputs = []
    if whole:
        cut = partial(part, tokens=slice(whole))
        of_whole = tuple(layer.each(cut) for layer in gates)
        o, state = _run(cut(q), cut(k), cut(v), state, of_whole, rule, norm_weight, None, None, keep)
        outputs.append(o)
    cut = partial(part, tokens=slice(whole, None))
    of_rest = tuple(layer.each(cut) for layer in gates)
    nothing = None, None, None, None
    o, state = neural_memory_chunked(cut(q), cut(k), cut(v), state, of_rest, rule, norm_weight, *nothing)
    return torch.cat([*outputs, o], dim=1), state


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: MemoryState,
    gates: tuple[Gates, ...],
    rule: Rule,
    norm_weight: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    keep: Keep,
) -> tuple[torch.Tensor, MemoryState]:
    from riverrun.kernels.neural_memory.triton_gates import chunk_gates_triton

    read: Literal["after", "before"] = "before" if rule.read == "before" else "after"
    shared = all(layer is gates[0] for layer in gates)
    online = is_exact_online(rule, len(gates), norm_weight)
    size = ONLINE_CHUNK if online else rule.chunk_size
    of_chunks = [chunk_gates_triton(layer, size, cu_seqlens) for layer in gates[: 1 if shared else 2]]
    weights: Weights
    momentum: Weights | None
    if len(gates) == 1:
        from riverrun.kernels.neural_memory.triton_linear_op import linear_memory_triton

        o, W, S = linear_memory_triton(
            q, k, v, of_chunks[0], state.weights[0], None if state.momentum is None else state.momentum[0], cu_seqlens,
            chunk_size=size, online=online, read=read, keep=keep,
        )  # fmt: skip
        weights, momentum = (W,), None if S is None else (S,)
    else:
        from riverrun.kernels.neural_memory.triton_mlp import mlp_memory_triton

        o, weights, momentum = mlp_memory_triton(
            q, k, v, (of_chunks[0], of_chunks[-1]), norm_weight, (state.weights[0], state.weights[1]),
            None if state.momentum is None else (state.momentum[0], state.momentum[1]), cu_seqlens,
            chunk_size=size, activation=rule.activation, residual=rule.residual, read=read, keep=keep,
            max_seqlen=max_seqlen,
        )  # fmt: skip
    return o, MemoryState(weights, momentum, weights if rule.chunk_size > 1 else None)
