"""A neural memory one token at a time, by the gradient of its inner loss: what the other forms are tested against.

With b tokens a chunk, W̄ the weights that the accumulators A are at a chunk's start, and for each token

    u_t = Σ_{i = t−c+1 … t} γ_i ∇ℓ(W̄; k_i, v_i)
    S_t = η_t S_{t−1} − θ_t u_t        A_t = (1 − α_t) A_{t−1} + S_t        o_t = f(W_t; q_t)

(Titans, arXiv 2501.00663, eqs. 8–15: b = c = γ = 1; ATLAS, arXiv 2505.23735, eq. 9, for the window.) An orthogonalised
memory adds Σ_t (Π_{j>t} (1 − α_j)) θ_t NS(S_b) to its decayed weights at a chunk's end instead, and its S takes θ = 1.
"""

import itertools

import torch

from riverrun.kernels.common.chunks import sequence_bounds
from riverrun.kernels.common.memory_rule import Rule
from riverrun.kernels.neural_memory.network import EPS, orthogonalise, read, scales, weights_of
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Weights


def inner_loss(
    rule: Rule,
    weights: Weights,
    norm_weight: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    delta: torch.Tensor | None,
) -> torch.Tensor:
    """ℓ (n, H) at k (n, H, 1, K), v (n, H, 1, V), delta (n, H)."""
    f = read(rule, len(weights), k, norm_weight, lambda layer, x: x @ weights[layer])
    if rule.bias == "dot":
        return -(f * v).sum((-2, -1))
    e = f - v
    if rule.bias == "lp":
        return ((e.square() + EPS) ** (rule.p / 2)).sum((-2, -1)) / rule.p
    if rule.bias == "l2":
        return e.square().sum((-2, -1)) / 2
    assert delta is not None
    size, delta = e.abs(), delta[..., None, None]
    return torch.where(size <= delta, e.square() / 2, delta * (size - delta / 2)).sum((-2, -1))


def neural_memory_reference(
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
) -> tuple[torch.Tensor, MemoryState]:
    """`riverrun.kernels.neural_memory.neural_memory`, continuing `state`: a loop over sequences and their tokens."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    bounds = sequence_bounds(q, cu_seqlens).tolist()
    rows = [x if x is None else x.to(dtype).flatten(0, 1) for x in (q, k, v, delta, gamma)]
    layers = [layer.each(lambda x: x.to(dtype).flatten(0, 1)) for layer in gates]
    outputs, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        inputs = [x if x is None else x[start:end] for x in rows]
        own = [layer.each(lambda x: x[start:end]) for layer in layers]  # noqa: B023 - used at once
        seen = 0 if position is None else int(position[i])
        o, left = _sequence(rule, norm_weight, _pick(state, i), own, seen, *inputs)  # type: ignore[arg-type]
        outputs.append(o)
        states.append(left)
    o = torch.cat(outputs).view(*q.shape[:2], *outputs[0].shape[1:]).to(q.dtype)
    return o, MemoryState(*(None if x[0] is None else tuple(map(torch.cat, zip(*x))) for x in zip(*states)))  # type: ignore[arg-type]


def _sequence(
    rule: Rule,
    norm_weight: torch.Tensor | None,
    state: MemoryState,
    gates: list[Gates],
    seen: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    delta: torch.Tensor | None,
    gamma: torch.Tensor | None,
) -> tuple[torch.Tensor, MemoryState]:
    """q, k, v (T, H, …): → o (T, H, V), and the state afterwards."""
    A, S, anchor, pending, past = state
    halo = rule.window - 1
    if halo:
        assert past is not None and gamma is not None
        k, v, gamma = (torch.cat([old[0], new]) for old, new in zip(past, (k, v, gamma)))
    anchor = A if anchor is None else anchor
    outputs = []
    for t in range(len(q)):
        if (seen + t) % rule.chunk_size == 0:
            anchor = A
        start, found = weights_of(rule, anchor), A
        u = [torch.zeros_like(w) for w in start]
        for i in range(t, t + rule.window):
            weight = 1.0 if gamma is None else gamma[i][:, None, None]
            of_token = _gradients(rule, start, norm_weight, k[i], v[i], None if delta is None else delta[i])
            u = [total + weight * own for total, own in zip(u, of_token)]
        at_end = (seen + t + 1) % rule.chunk_size == 0
        written = [
            _write(rule, gates[layer], t, layer, A[layer], u[layer], S, pending, at_end) for layer in range(len(A))
        ]
        A, S, pending = (None if x[0] is None else x for x in zip(*written))  # type: ignore[assignment]
        W = start
        if rule.read != "chunk":
            W = tuple(a * s for a, s in zip(A if rule.read == "after" else found, scales(rule, anchor)))
        outputs.append(_read(rule, W, norm_weight, q[t]))
    if (seen + len(q)) % rule.chunk_size == 0:
        anchor = A
    last = (k[None, len(k) - halo :], v[None, len(v) - halo :], gamma[None, len(k) - halo :]) if halo else None  # type: ignore[index]
    return torch.stack(outputs), MemoryState(A, S, anchor if rule.chunk_size > 1 else None, pending, last)


def _write(
    rule: Rule,
    gates: Gates,
    t: int,
    layer: int,
    A: torch.Tensor,
    u: torch.Tensor,
    momentum: Weights | None,
    pending: Weights | None,
    at_end: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A (1, H, in, out) after token t, and likewise S and what is pending."""
    keep = _of_outputs(gates.log_keep[t]).exp()
    lr = _of_outputs(gates.lr[t])
    if pending is not None:
        assert momentum is not None and gates.log_momentum is not None
        S = _of_outputs(gates.log_momentum[t]).exp() * momentum[layer] - u
        A, steps = keep * A, (keep * pending[layer][..., None, None] + lr)[..., 0, 0]
        if at_end:
            A, steps = A + steps[..., None, None] * orthogonalise(S, rule.newton_schulz), torch.zeros_like(steps)
        return A, S, steps
    if momentum is None:
        return keep * A - lr * u, None, None
    assert gates.log_momentum is not None
    S = _of_outputs(gates.log_momentum[t]).exp() * momentum[layer] - lr * u
    return keep * A + S, S, None


def _gradients(
    rule: Rule,
    weights: Weights,
    norm_weight: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    delta: torch.Tensor | None,
) -> Weights:
    """Of the inner loss of one token, k (H, K), v (H, V), with respect to the weights (1, H, in, out)."""
    inputs = k[None, :, None], v[None, :, None], None if delta is None else delta[None]
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        at = tuple(w if outer and w.requires_grad else w.detach().requires_grad_() for w in weights)
        loss = inner_loss(rule, at, norm_weight, *inputs)
        return torch.autograd.grad(loss.sum(), at, create_graph=outer)


def _read(rule: Rule, weights: Weights, norm_weight: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    return read(rule, len(weights), q[None, :, None], norm_weight, lambda layer, x: x @ weights[layer])[0, :, 0]


def _of_outputs(gate: torch.Tensor) -> torch.Tensor:
    """(H,) or (H, out) → (1, H, 1, 1 or out)."""
    return gate.view(1, len(gate), 1, -1)


def _pick(state: MemoryState, i: int) -> MemoryState:
    return MemoryState(*(None if x is None else tuple(t[i : i + 1] for t in x) for x in state))  # type: ignore[arg-type]
