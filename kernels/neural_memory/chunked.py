"""A neural memory in chunks of tokens, each a handful of matrix products: no gradient of a single token is ever formed.

Within a chunk gradients are taken at its first weights, so all of its tokens learn at once, and a layer with inputs x_i
and gradients δ_i of its outputs (`network.py`) takes what a token passes through it, at the weights which that token
reads, from the weights at the chunk's start and from all pairs of tokens (`gates.py` has β, f and G):

    x W_t = β_t x A + f_t x S − Σ_i G_ti ⟨x, x_i⟩ δ_i

A linear memory with an ℓ2 loss is exact at b = 1 in chunks of any size: the errors e_i, at weights that hold all
earlier writes, solve one unit triangular system, the delta rule's (arXiv 2406.06484, §3) with momentum. With G⁻, β⁻ and
f⁻ a row late,

    (I + G⁻ ∘ K Kᵀ) E = β⁻ K A + f⁻ K S − V

Chunks follow each other; under autograd many of them are recomputed in groups of the square root of their number.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from riverrun.kernels.common.chunks import Chunks, chunk_layout
from riverrun.kernels.common.memory_rule import Rule
from riverrun.kernels.neural_memory.gates import ChunkGates, chunk_ends, chunk_gates, late
from riverrun.kernels.neural_memory.network import learn, orthogonalise, product, read, scales, weights_of
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Weights
from riverrun.kernels.neural_memory.sources import Sources, with_window

ONLINE_CHUNK = 64
FEW = 8  # chunks whose products are kept for the backward pass, sooner than computed again


class _Running(NamedTuple):
    """Of n sequences between two chunks: per layer (n, H, in, out)."""

    weights: Weights
    momentum: Weights | None
    anchor: Weights
    pending: Weights | None


class _Terms(NamedTuple):
    """Of M chunks, or of those of one step."""

    q: torch.Tensor  # (M, H, b, K)
    k: torch.Tensor  # (M, H, s, K)
    v: torch.Tensor  # (M, H, s, V)
    gates: tuple[ChunkGates, ...]
    delta: torch.Tensor | None  # (M, H, s)
    steps: Weights | None  # (M, H) per layer, what a chunk adds to `MemoryState.pending`
    full: torch.Tensor  # (M,) whether the next token begins a chunk


def neural_memory_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: MemoryState,
    gates: tuple[Gates, ...],
    rule: Rule,
    norm_weight: torch.Tensor | None,
    delta: torch.Tensor | None,
    gamma: torch.Tensor | None,
    position: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    online_chunk: int = ONLINE_CHUNK,
) -> tuple[torch.Tensor, MemoryState]:
    """`riverrun.kernels.neural_memory.neural_memory`, continuing `state`, with the gates of every layer."""
    T = q.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    inner = q.dtype if rule.read == "chunk" else dtype  # a chunk's own products, which no later errors build on
    online = is_exact_online(rule, len(gates), norm_weight)
    skip = None
    if T == 1:  # a chunk of its own, whose gradient is taken at the state's anchor all the same
        chunks = chunk_layout(q, 1, cu_seqlens)
        seen = torch.zeros_like(chunks.order) if position is None else position
        full = (seen + 1) % rule.chunk_size == 0
    else:
        if position is not None and rule.chunk_size > 1:
            skip = position % rule.chunk_size
        chunks = chunk_layout(q, min(online_chunk, T) if online else rule.chunk_size, cu_seqlens, skip)
        full = chunks.valid[:, -1]

    def split(x: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
        """(B, T, H, …) → (M, H, b, …), one after the other in memory, as products would copy them to be each time."""
        return chunks.split(x.to(dtype)).transpose(1, 2).contiguous()

    if rule.window == 1:
        sources = Sources(split(k, inner), split(v, inner))
    else:
        assert gamma is not None
        k, v, gamma = (x.to(dtype) for x in (k, v, gamma))
        sources = with_window(chunks, k, v, gamma, state, rule.window, cu_seqlens, skip)
    shared = all(layer is gates[0] for layer in gates)
    in_chunks = [_split_gates(split, layer, rule) for layer in (gates[:1] if shared else gates)]
    ends = rule.read == "chunk" and rule.window == 1 and all(x is None or x.ndim == 3 for g in in_chunks for x in g)
    of_chunks = [
        chunk_ends(g, chunks.valid) if ends else chunk_gates(g, chunks.valid, sources.weight) for g in in_chunks
    ]
    terms = _Terms(
        split(q, inner),
        sources.k.to(inner),
        sources.v.to(inner),
        tuple(of_chunks * len(gates) if shared else of_chunks),
        None if delta is None else split(delta, inner),
        tuple(_steps(split(g.log_keep), split(g.lr)) for g in gates) if rule.newton_schulz else None,
        full,
    )
    running = _Running(state.weights, state.momentum, _anchor(state, rule, position), state.pending)
    o, running = _walk(chunks, partial(_chunk, rule, norm_weight, online), running, terms)
    anchor = None if rule.chunk_size == 1 else running.anchor
    final = MemoryState(running.weights, running.momentum, anchor, running.pending, sources.past)
    return chunks.join(o.transpose(1, 2)).to(q.dtype), final


def write_chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    state: MemoryState,
    gates: tuple[Gates, ...],
    rule: Rule,
    norm_weight: torch.Tensor | None,
    delta: torch.Tensor | None,
) -> MemoryState:
    """The state (S = 1) after all tokens k (1, T, H, K) and v (1, T, H, V) as one chunk, which nothing reads; not of
    windows or orthogonal updates."""
    assert rule.window == 1 and not rule.newton_schulz
    dtype = torch.promote_types(k.dtype, torch.float32)
    inner = k.dtype if rule.read == "chunk" else dtype
    valid = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    k, v = (x.transpose(1, 2).to(inner) for x in (k, v))

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).transpose(1, 2)

    if all(x is None or x.ndim == 3 for layer in gates for x in layer):
        from riverrun.kernels.neural_memory.long_chunks import end_of_chunk  # which imports this file

        of_chunks = end_of_chunk(gates, dtype)
    else:
        of_chunks = [chunk_gates(_split_gates(split, layer, rule), valid) for layer in gates]
    delta = None if delta is None else delta.transpose(1, 2).to(inner)
    running = _Running(state.weights, state.momentum, state.weights, None)
    terms = _Terms(k, k, v, tuple(of_chunks), delta, None, torch.ones_like(valid[:, 0]))
    inputs, gradients = learn(rule, k, v, weights_of(rule, state.weights), norm_weight, delta)
    left = _leave(rule, running, terms, inputs, gradients)
    return MemoryState(left.weights, left.momentum, left.weights)


def _anchor(state: MemoryState, rule: Rule, position: torch.Tensor | None) -> Weights:
    """The accumulators at the start of the chunk that the next token belongs to."""
    if state.anchor is None or position is None:
        return state.weights
    begins = (position % rule.chunk_size == 0)[:, None, None, None]
    return tuple(torch.where(begins, new, old) for new, old in zip(state.weights, state.anchor))


def is_exact_online(rule: Rule, num_layers: int, norm_weight: torch.Tensor | None) -> bool:
    """Whether the online rule is one triangular solve a chunk."""
    affine = num_layers == 1 and norm_weight is None and rule.bias in ("l2", "dot") and rule.retention == "none"
    return affine and rule.chunk_size == rule.window == 1 and rule.read != "chunk"


def _split_gates(split: Callable[[torch.Tensor], torch.Tensor], gates: Gates, rule: Rule) -> Gates:
    """(M, H, b), or (M, H, R, b) of every output; an orthogonal update counts `_steps` instead of its θ."""
    if rule.newton_schulz:
        gates = gates._replace(lr=torch.ones_like(gates.lr))
    return gates.each(lambda x: split(x) if x.ndim == 3 else split(x).mT)


def _steps(log_keep: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """Σ_t (β_b / β_t) θ_t (M, H), of (M, H, b): a chunk of updates, each of them its last one."""
    return chunk_ends(Gates(log_keep, lr), torch.ones_like(lr[:, 0], dtype=torch.bool)).weight.sum((-2, -1))


def _walk(
    chunks: Chunks, chunk: Callable[[_Running, _Terms], tuple[torch.Tensor, _Running]], running: _Running, terms: _Terms
) -> tuple[torch.Tensor, _Running]:
    """All chunks of all sequences: their outputs (M, H, b, V), and what is left at the sequences' ends."""

    def group(steps: range, running: _Running) -> tuple[list[torch.Tensor], list[_Running], _Running]:
        outputs, ended = [], []
        for s in steps:
            active = chunks.active[s]
            if active < chunks.active[max(s - 1, 0)]:  # the last ones, which are the shortest, have ended
                ended.append(_cut(running, slice(active, None)))
                running = _cut(running, slice(active))
            o, running = chunk(running, _cut(terms, chunks.step(s)))
            outputs.append(o)
        return outputs, ended, running

    running = _map(chunks.sort, running)
    num_steps = len(chunks.active)
    size = isqrt(num_steps)
    outputs, ended = [], []
    for start in range(0, num_steps, size):
        steps = range(start, min(start + size, num_steps))
        if torch.is_grad_enabled() and num_steps > FEW:
            o, e, running = checkpoint(group, steps, running, use_reentrant=False, preserve_rng_state=False)
        else:
            o, e, running = group(steps, running)
        outputs += o
        ended += e
    running = _map(lambda *parts: chunks.unsort(torch.cat(parts)), running, *reversed(ended))
    return torch.cat(outputs), running


def _chunk(
    rule: Rule, norm_weight: torch.Tensor | None, online: bool, running: _Running, terms: _Terms
) -> tuple[torch.Tensor, _Running]:
    """The outputs of one chunk of every sequence, and what it leaves."""
    anchor = weights_of(rule, running.anchor)
    if online:
        inputs, gradients = [terms.k], [_online_errors(rule, running, terms)]
    else:
        inputs, gradients = learn(rule, terms.k, terms.v, anchor, norm_weight, terms.delta)
    scale = scales(rule, running.anchor)
    gates = [late(g) for g in terms.gates] if rule.read == "before" else terms.gates

    def apply(layer: int, x: torch.Tensor) -> torch.Tensor:
        if rule.read == "chunk":
            return product(x, anchor[layer])
        learnt = _through_learnt(x, gates[layer], inputs[layer], gradients[layer])
        return scale[layer] * (_through_kept(x, layer, running, gates[layer]) - learnt)

    o = read(rule, len(anchor), terms.q, norm_weight, apply)
    return o, _leave(rule, running, terms, inputs, gradients)


def _online_errors(rule: Rule, running: _Running, terms: _Terms) -> torch.Tensor:
    """The gradient of each token (n, H, b, V) at the weights that it finds, of a linear memory."""
    if rule.bias == "dot":
        return -terms.v
    gates, k = late(terms.gates[0]), terms.k
    right = _through_kept(k, 0, running, gates) - (terms.v - k if rule.residual else terms.v)
    scores = k @ k.mT
    if gates.weight.dim() == scores.dim():
        return torch.linalg.solve_triangular(gates.weight * scores, right, upper=False, unitriangular=True)
    system = gates.weight * scores[:, :, None]  # one of every output
    return torch.linalg.solve_triangular(system, right.mT[..., None], upper=False, unitriangular=True).squeeze(-1).mT


def _through_kept(x: torch.Tensor, layer: int, running: _Running, gates: ChunkGates) -> torch.Tensor:
    """β x A + f x S."""
    out = _weighted(gates.decay, product(x, running.weights[layer]))
    if running.momentum is None or gates.carry is None:
        return out
    return out + _weighted(gates.carry, product(x, running.momentum[layer]))


def _through_learnt(x: torch.Tensor, gates: ChunkGates, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Σ_i G_ti ⟨x_t, x_i⟩ δ_i."""
    scores = x @ inputs.mT
    if gates.weight.dim() == scores.dim():
        return (gates.weight * scores) @ gradients
    return ((gates.weight * scores[:, :, None]) @ gradients.mT[..., None]).squeeze(-1).mT


def _leave(
    rule: Rule, running: _Running, terms: _Terms, inputs: list[torch.Tensor], gradients: list[torch.Tensor]
) -> _Running:
    weights, momentum, pending = [], [], []
    full = terms.full[:, None, None, None]
    for layer, gates in enumerate(terms.gates):
        W, x, gradient = running.weights[layer], inputs[layer], gradients[layer]
        if rule.newton_schulz:  # makes as much of a sum's rounding as of what it sums
            x, gradient = x.to(W.dtype), gradient.to(W.dtype)
        decay = _of_outputs(gates.decay[..., -1])
        kept = decay * W
        if running.momentum is None:
            weights.append(kept - _written(gates.weight[..., -1, :], x, gradient, W))
            continue
        S = running.momentum[layer]
        assert gates.carry is not None and gates.momentum_decay is not None and gates.momentum_weight is not None
        momentum.append(_of_outputs(gates.momentum_decay) * S - _written(gates.momentum_weight, x, gradient, S))
        if running.pending is None or terms.steps is None:
            kept = kept + _of_outputs(gates.carry[..., -1]) * S
            weights.append(kept - _written(gates.weight[..., -1, :], x, gradient, W))
            continue
        steps = (gates.decay[..., -1] * running.pending[layer] + terms.steps[layer])[..., None, None]
        weights.append(kept + torch.where(full, steps * orthogonalise(momentum[-1], rule.newton_schulz), 0))
        pending.append(torch.where(full, 0, steps)[..., 0, 0])
    anchor = tuple(torch.where(full, new, old) for new, old in zip(weights, running.anchor))
    return _Running(tuple(weights), tuple(momentum) or None, anchor, tuple(pending) or None)


def _weighted(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x (n, H, b, out) by a weight a token (n, H, b), or one of every output too (n, H, out, b)."""
    return x * (weight.mT if weight.dim() == x.dim() else weight[..., None])


def _of_outputs(weight: torch.Tensor) -> torch.Tensor:
    """(n, H) or (n, H, out) → (n, H, 1, 1 or out)."""
    return weight[..., None, None] if weight.dim() == 2 else weight[:, :, None]


def _written(weight: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Σ_i weight_i x_i δ_iᵀ (n, H, in, out), the weights (n, H, s) or (n, H, out, s)."""
    return (x.mT @ _weighted(weight.to(x.dtype), gradient)).to(like.dtype)


def _cut(x: Any, part: slice) -> Any:
    return _map(lambda t: t[part], x)


def _map(function: Callable[..., torch.Tensor], *trees: Any) -> Any:
    """Of the tensors of named tuples, tuples of them, or None, all of one form."""
    first = trees[0]
    if first is None or isinstance(first, torch.Tensor):
        return None if first is None else function(*trees)
    parts = [_map(function, *each) for each in zip(*trees, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
