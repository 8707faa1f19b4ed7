"""Gated memories read at the starts of long chunks, LaCT's form (arXiv 2505.23884), as a torch operator of matrix
products and fused passes (`long_chunks_walk.py`). The general form, which also has norms, residuals, other losses and
packed documents, is `chunked.py`.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch.nn.functional import normalize, pad

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, in_double, is_due
from riverrun.kernels.common.whole import ceil_div
from riverrun.kernels.neural_memory.chunked import neural_memory_chunked
from riverrun.kernels.neural_memory.gated import fused
from riverrun.kernels.neural_memory.gates import ChunkGates, chunk_ends
from riverrun.kernels.neural_memory.long_chunks_walk import Sizes, walk, walk_back
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Rule, Weights

Made = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor,
]  # fmt: skip


def neural_memory_long(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: MemoryState,
    gates: tuple[Gates, ...],
    rule: Rule,
    resumable: bool = True,
) -> tuple[torch.Tensor, MemoryState]:
    """`riverrun.kernels.neural_memory.neural_memory` of gated memories that `triton_path.py` calls long ones, whose
    sequences begin a chunk; `state` is theirs, or that of one (S = 1) which all start from."""
    T = q.shape[1]
    whole = T - T % rule.chunk_size
    if not resumable or whole in (0, T):
        o, after = _run(q, k, v, state, gates, rule)
        return o, after._replace(anchor=after.weights if whole else _of_all(state.weights, len(q)))

    def run(tokens: slice, state: MemoryState) -> tuple[torch.Tensor, MemoryState]:
        of_tokens = tuple(layer.each(lambda x: x[:, tokens]) for layer in gates)
        return _run(q[:, tokens], k[:, tokens], v[:, tokens], state, of_tokens, rule)

    o, before = run(slice(whole), state)  # where the last, open chunk begins
    rest, after = run(slice(whole, None), before)
    return torch.cat([o, rest], 1), after._replace(anchor=before.weights)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: MemoryState, gates: tuple[Gates, ...], rule: Rule
) -> tuple[torch.Tensor, MemoryState]:
    """The state without an anchor."""
    q, k, v = (x.to(q.dtype).contiguous() for x in (q, k, v))
    dtype = torch.promote_types(q.dtype, torch.float32)
    start = (x.to(dtype) for x in pack(state.weights, state.momentum))
    tensors = q, k, v, *gates_of_chunks(of_layers(gates, dtype), rule.chunk_size), *start
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    o, first, second, *_ = _forward(*tensors, rule.chunk_size, rule.activation == "silu", rule.bias == "l2", save)
    return o, MemoryState(*unpack(first, second, len(q)))


def _of_all(weights: Weights, sequences: int) -> Weights:
    return tuple(w.expand(sequences, -1, -1, -1) for w in weights)


def gates_of_chunks(gates: Gates, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`writes` (L, P, B, T, H) and `ends` (L, 1 or 3, B, chunks, H) of gates (L, B, T, H) (`walk`)."""
    if not fused(gates.lr):
        return gates_in_torch(*gates, chunk_size)
    from riverrun.kernels.neural_memory.triton_long_gates import long_gates_triton

    return long_gates_triton(*gates, chunk_size)


def of_layers(gates: tuple[Gates, ...], dtype: torch.dtype) -> Gates:
    """(L, B, T, H), of L = 3 layers, or 1 if they share them."""
    if all(layer is gates[0] for layer in gates):
        return gates[0].each(lambda x: x[None].to(dtype))
    return Gates(*(None if parts[0] is None else torch.stack(parts).to(dtype) for parts in zip(*gates)))  # type: ignore[arg-type]


def gates_in_torch(
    log_keep: torch.Tensor, lr: torch.Tensor, log_momentum: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gates_of_chunks` for CPUs and float64."""
    (L, B, T, H), chunks = lr.shape, ceil_div(lr.shape[2], chunk_size)
    b = min(chunk_size, T)
    padding = chunks * b - T

    def split(x: torch.Tensor) -> torch.Tensor:
        """(L · B · chunks, H, b)"""
        return pad(x, (0, 0, 0, padding)).reshape(-1, b, H).transpose(1, 2)

    valid = (torch.arange(chunks * b, device=lr.device) < T).view(chunks, b).repeat(L * B, 1)
    of = chunk_ends(Gates(log_keep, lr, log_momentum).each(split), valid)
    writes, ends = [of.weight.squeeze(-2)], [of.decay.squeeze(-1)]
    if of.carry is not None and of.momentum_decay is not None and of.momentum_weight is not None:
        writes.append(of.momentum_weight)
        ends += [of.carry.squeeze(-1), of.momentum_decay]
    of_tokens = torch.stack(writes).view(-1, L, B, chunks, H, b).permute(1, 0, 2, 3, 5, 4)
    of_chunks = torch.stack(ends).view(-1, L, B, chunks, H).transpose(0, 1)
    return of_tokens.flatten(3, 4)[..., :T, :].contiguous(), of_chunks.contiguous()


def end_of_chunk(gates: tuple[Gates, ...], dtype: torch.dtype) -> list[ChunkGates]:
    """Of every layer, for all tokens as one chunk: what its last row says."""
    writes, ends = gates_of_chunks(of_layers(gates, dtype), gates[0].lr.shape[1])
    of_layer = []
    for of_tokens, of_end in zip(writes.movedim(-1, -2).unbind(), ends.movedim(-1, -2).unbind()):
        weight, momentum_weight = of_tokens[0][..., None, :], of_tokens[-1]  # (B, H, 1, T) and (B, H, T)
        decay, *rest = of_end.unbind()  # (B, H, 1)
        with_momentum = (rest[0], rest[1].squeeze(-1), momentum_weight) if rest else (None, None, None)
        of_layer.append(ChunkGates(decay, weight, *with_momentum))
    return of_layer * (len(gates) // len(of_layer))


def pack(weights: Weights, momentum: Weights | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, H, K, F) twice and (S, H, F, V), and those of the momentum → (S · H, K, P, 2, F), (S · H, F, P, 1, V)."""
    parts = [weights] if momentum is None else [weights, momentum]
    first = torch.stack([x for layers in parts for x in layers[:2]], 3)
    second = torch.stack([layers[2] for layers in parts], 3)
    return first.unflatten(3, (len(parts), 2)).flatten(0, 1), second[:, :, :, :, None].flatten(0, 1)


def unpack(first: torch.Tensor, second: torch.Tensor, B: int) -> list[Weights]:
    """The inverse: of the weights, and of the momentum if there is one."""
    first, second = (x.unflatten(0, (B, -1)) for x in (first, second))
    return [(*x.unbind(3), y.squeeze(3)) for x, y in zip(first.unbind(3), second.unbind(3))]


def check(q: torch.Tensor, first: torch.Tensor, V: int, shared: bool, silu: bool, l2: bool, back: bool) -> None:
    """The self-check of the forward kernels for such tensors, or of the backward ones."""
    dtype, device, H, (K, P, _, F) = q.dtype, q.device, q.shape[2], first.shape[1:]
    bias, activation = "l2" if l2 else "dot", "silu" if silu else "gelu"
    rule = Rule(chunk_size=48, read="chunk", bias=bias, activation=activation, gated=True)  # type: ignore[arg-type]

    def compare() -> float:
        draw, B, T = draws(device), 2, 128
        inputs = [*(normalize(draw(B, T, H, K), dim=-1).to(dtype) for _ in range(2)), draw(B, T, H, V).to(dtype)]
        for _ in range(1 if shared else 3):
            log_keep, lr, log_momentum = -draw(B, T, H).exp() / 64, draw(B, T, H).sigmoid(), -draw(B, T, H).exp()
            inputs += [log_keep, lr, log_momentum][: 1 + P]
        for scale in (1.0, 0.1)[:P]:
            inputs += [scale * draw(1, H, n, m) * n**-0.5 for n, m in ((K, F), (K, F), (F, V))]
        upstream = draw(B, T, H, V).to(dtype)

        def sort(tensors: Sequence[torch.Tensor]) -> tuple[MemoryState, tuple[Gates, ...]]:
            count = 1 + P
            layers = tensors[3 : -3 * P]
            gates = tuple(Gates(*layers[i : i + count]) for i in range(0, len(layers), count))
            state = tuple(tensors[-3 * P :])
            return MemoryState(state[:3], state[3:] or None, state[:3]), gates * (3 if shared else 1)

        def chunked(*tensors: torch.Tensor) -> list[torch.Tensor]:
            state, gates = sort(tensors)
            state = state.each(lambda x: x.expand(B, -1, -1, -1))
            q, k, v = tensors[:3]
            o, after = neural_memory_chunked(q, k, v, state, gates, rule, None, None, None, None, None)
            return [o, *after.weights, *(after.momentum or ())]

        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            start, gates = sort(leaves)
            of_chunks = gates_in_torch(*of_layers(gates, torch.float32), rule.chunk_size)
            prepared = [*leaves[:3], *of_chunks, *pack(start.weights, start.momentum)]
        q, k, v, writes, ends, *state = (x.detach() for x in prepared)
        options = rule.chunk_size, silu, l2
        o, final, room = walk(q, k, v, writes, ends, state, *options, save=True)
        if not back:
            return deviation([o, *chain(*unpack(final[0], final[1], B))], in_double(chunked, inputs, None))
        grads = walk_back(upstream, None, writes, ends, state, room, *options)
        got = torch.autograd.grad(prepared, leaves, grads)
        return deviation(got, in_double(chunked, inputs, upstream)[1 + 3 * P :])

    sizes: dict[str, object] = {"H": H, "K": K, "F": F, "V": V, "momentum": P == 2, "shared": shared}
    sizes |= {"silu": silu, "l2": l2, "gradients": back, "dtype": dtype}
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    check_once("neural_memory_long", sizes, device, compare, 1e-4 if exact else 5e-2)


@operator("neural_memory_long")
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    writes: torch.Tensor,
    ends: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    chunk_size: int,
    silu: bool,
    l2: bool,
    save: bool,
) -> Made:
    if is_due(q):
        check(q, first, v.shape[-1], len(writes) == 1, silu, l2, back=False)
    o, final, room = walk(q, k, v, writes, ends, (first, second), chunk_size, silu, l2, save)
    return o, *final, *(room if save else [q.new_empty(0) for _ in room])  # type: ignore[return-value]


@_forward.register_fake
def _(q, k, v, writes, ends, first, second, chunk_size, silu, l2, save):
    room = Sizes.of(v, first, chunk_size).room(q, (first, second), save)
    N = q.shape[0] * q.shape[2]
    final = [x.new_empty(N, *x.shape[1:]) for x in (first, second)]
    return torch.empty_like(v), *final, *(room if save else [q.new_empty(0) for _ in room])


@operator("neural_memory_long_backward")
def _backward(
    grad_o: torch.Tensor,
    grad_first: torch.Tensor | None,
    grad_second: torch.Tensor | None,
    writes: torch.Tensor,
    ends: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    room: list[torch.Tensor],
    chunk_size: int,
    silu: bool,
    l2: bool,
) -> list[torch.Tensor]:
    if is_due(grad_o):
        check(grad_o, first, grad_o.shape[-1], len(writes) == 1, silu, l2, back=True)
    state, final = (first, second), None
    if grad_first is not None or grad_second is not None:
        N, grads = grad_o.shape[0] * grad_o.shape[2], (grad_first, grad_second)
        final = [x.new_zeros(N, *x.shape[1:]) if grad is None else grad for grad, x in zip(grads, state)]
    return walk_back(grad_o, final, writes, ends, state, room, chunk_size, silu, l2)


@_backward.register_fake
def _(grad_o, grad_first, grad_second, writes, ends, first, second, room, *_):
    B, T, H, _ = grad_o.shape
    like_q = [grad_o.new_empty(B, T, H, first.shape[1]) for _ in range(2)]
    return [*like_q, *map(torch.empty_like, (grad_o, writes, ends, first, second))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, _, *tensors, ctx.chunk_size, ctx.silu, ctx.l2, save = inputs
    assert save, "what a backward pass needs was not kept"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *tensors, *output[3:])


def _gradient(
    ctx: Any, grad_o: torch.Tensor | None, grad_first: torch.Tensor | None, grad_second: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    o, writes, ends, first, second, *room = ctx.saved_tensors
    grad_o = torch.zeros_like(o) if grad_o is None else grad_o.contiguous()
    grads = (x if x is None else x.contiguous() for x in (grad_first, grad_second))
    made = _backward(grad_o, *grads, writes, ends, first, second, room, ctx.chunk_size, ctx.silu, ctx.l2)
    return *made, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup)
