"""A neural memory: a network that each token teaches and asks, whose weights are the recurrent state.

Titans (arXiv 2501.00663), Miras (2504.13173) and ATLAS (2505.23735) are settings of one rule (`Rule`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.common.memory_rule import Rule
from riverrun.kernels.neural_memory.chunked import neural_memory_chunked, write_chunk
from riverrun.kernels.neural_memory.network import read, weights_of
from riverrun.kernels.neural_memory.reference import neural_memory_reference
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Weights, fresh_state
from riverrun.kernels.neural_memory.triton_path import Keep, kind_of, linear_chunk_of, neural_memory_triton

__all__ = ["Gates", "MemoryState", "Rule", "fresh_state", "neural_memory", "read_memory", "write_memory"]


def neural_memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: Weights,
    gates: Gates | Sequence[Gates],
    *,
    rule: Rule,
    norm_weight: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    initial_state: MemoryState | None = None,
    position: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    resumable: bool = True,
    keep: Keep = "root",
    backend: str = "auto",
) -> tuple[torch.Tensor, MemoryState]:
    """Each token takes a step down the gradient of ℓ(f(k), v) in the weights of f, and reads f(q).

        S_t = η_t S_{t−1} − θ_t ∇ℓ(W̄; k_t, v_t)        W_t = (1 − α_t) W_{t−1} + S_t        o_t = f(W_t; q_t)

    f(x) = [x +] [γ LN](… φ(x W₁) … W_L); W̄ are the weights at the start of the token's chunk (`Rule` has the variants,
    and their sources). Gradients of everything pass through the inner gradient. Arithmetic is float32 (float64 if `q`
    is float64), also under autocast; that inside of chunks of the inputs' type if `rule.read` is "chunk". Values are
    not checked: θ beyond 2(1 − η) / (1 + √(b / K))² makes the memory of unit keys grow without bound.

    Args:
        q, k: (B, T, H, K), queries and keys.
        v: (B, T, H, V), values; V = K if `rule.residual`.
        weights: per layer (H, in, out), the memory before a sequence's first token: one matrix (K, V), a chain of
            them, or the three of `rule.gated`.
        gates: of all layers, or of each.
        norm_weight: (H, V), the gain of a LayerNorm of the last layer's outputs; None: no norm.
        delta: (B, T, H), δ of the bias "huber".
        gamma: (B, T, H), the weights in [0, 1] of tokens in `rule.window`.
        initial_state: what the S sequences start from instead of `weights`.
        position: (S,) integers, how many tokens of each sequence `initial_state` has seen; None: none, or whole chunks.
        cu_seqlens: (N + 1,) integers rising from 0 to T: the bounds of documents packed into a batch of one row.
        max_seqlen: no document has more tokens (gradients of longer ones come out wrong); None: T. The backward kernels
            of two layers are launched for each group of chunks that a document may have.
        resumable: whether a later call is to go on from the returned state; else its `anchor` says nothing. Triton's
            kernels for chunks of more than one token need to know: of packed documents they leave no such state.
        keep: the states that a backward pass of Triton's kernels finds: "root", of two layers those before every √n-th
            of a sequence's n chunks and of a linear memory none, the rest computed again; "all", every chunk's, in the
            type of the inputs, and none is computed again. Until that pass "all" holds about H · P · F (K + V) numbers
            more a chunk, or of a linear memory H (P · K V + C (2 C + V)); with F hidden channels, C tokens, P 2 with a
            momentum, else 1. Other forms keep what they keep.
        backend: "auto", "reference", "chunked" or "triton" (see `resolve_backend`). Triton has linear memories and
            those of two layers, with an ℓ2 loss and gates of heads or layers, in chunks of 16 to 64 tokens, or online;
            and gated ones without norm or residual that are read at the starts of chunks of at least their width.

    Returns:
        o (B, T, H, V) in the dtype of `q`, and the state of every sequence after it. Any split of a sequence into
        resumable calls gives the same.

    Raises:
        ValueError: an argument of the wrong shape or one that the rule misses or does not know, a rule that contradicts
            itself, bad `cu_seqlens`, or a `keep` or a backend that there is not.
    """
    if keep not in get_args(Keep):
        raise ValueError(f"neural_memory: keep must be 'root' or 'all', got {keep!r}")
    layers = tuple(gates for _ in weights) if isinstance(gates, Gates) else tuple(gates)
    _check(q, k, v, weights, layers, rule, norm_weight, delta, gamma, initial_state, position, cu_seqlens)
    goes_on = position is not None and rule.chunk_size > 1  # maybe in the middle of a chunk, where kernels do not begin
    leaves = resumable and rule.chunk_size > 1 and cu_seqlens is not None
    kind = kind_of(weights, layers, rule, norm_weight, packed=cu_seqlens is not None)
    has_triton = q.shape[1] > 1 and not goes_on and not leaves and kind is not None
    if backend == "triton" and not has_triton:
        raise ValueError(
            "neural_memory: there is no Triton kernel for this rule, these sizes, a single token, packed documents "
            "that are to be gone on with, or a start within a chunk; use backend='auto' or 'chunked'"
        )
    chosen = resolve_backend("neural_memory", backend, q, q.shape[1], has_triton=has_triton)
    with torch.autocast(q.device.type, enabled=False):
        if initial_state is None:
            sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
            if chosen == "triton" and kind == "long":
                sequences = 1  # which all start from: their states are large
            momentum = layers[0].log_momentum is not None
            weights = tuple(w.to(torch.promote_types(q.dtype, torch.float32)) for w in weights)
            initial_state = fresh_state(weights, sequences, rule, momentum, v.shape[-1])
        if chosen == "triton":
            return neural_memory_triton(
                q, k, v, initial_state, layers, rule, norm_weight, cu_seqlens, max_seqlen, resumable, keep
            )
        # a single token is a chunk of its own, sooner than a step of the loop, which asks autograd for its gradient
        run = neural_memory_reference if backend == "reference" else neural_memory_chunked
        return run(q, k, v, initial_state, layers, rule, norm_weight, delta, gamma, position, cu_seqlens)


def read_memory(
    q: torch.Tensor, state: MemoryState, *, rule: Rule, norm_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """f(q) (B, T, H, V) of each row's memory as it is, of q (B, T, H, K), in the dtype of `q`. Nothing is written."""
    accumulators = state.weights if rule.read != "chunk" or state.anchor is None else state.anchor
    with torch.autocast(q.device.type, enabled=False):
        W = weights_of(rule, accumulators)
        x = q.to(W[0].dtype).transpose(1, 2)
        return read(rule, len(W), x, norm_weight, lambda layer, h: h @ W[layer]).transpose(1, 2).to(q.dtype)


def write_memory(
    k: torch.Tensor,
    v: torch.Tensor,
    state: MemoryState,
    gates: Sequence[Gates],
    *,
    rule: Rule,
    norm_weight: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    backend: str = "auto",
) -> MemoryState:
    """`neural_memory`'s state after tokens k (1, T, H, K) and v (1, T, H, V) that are one chunk, whatever
    `rule.chunk_size`, and that nothing reads: for few tokens, such as persistent ones, with little work for the host.

    Args:
        state: of one sequence (S = 1), at a chunk's start.
        gates: of every layer, (1, T, H) or (1, T, H, out).
        backend: "auto", "chunked" or "triton" (see `resolve_backend`). Triton's kernels take tokens that are no more
            than a chunk of the rule's, of the online rule up to 128, and are launched as for one that is read.

    Raises:
        ValueError: a rule with a window or with orthogonal updates, or a backend that there is not.
    """
    if rule.window > 1 or rule.newton_schulz:
        raise ValueError("write_memory: windows and orthogonal updates need neural_memory")
    layers, T = tuple(gates), k.shape[1]
    as_one = rule if rule.chunk_size > 1 else replace(rule, chunk_size=linear_chunk_of(T))
    one_chunk = 1 < T <= as_one.chunk_size and rule.read != "chunk"
    has_triton = one_chunk and kind_of(state.weights, layers, as_one, norm_weight, packed=False) is not None
    with torch.autocast(k.device.type, enabled=False):
        if resolve_backend("write_memory", backend, k, T, has_triton=has_triton) == "triton":
            return neural_memory_triton(  # reads are not left out: any will do
                k, k, v, state, layers, as_one, norm_weight, None, None, resumable=False, keep="root"
            )[1]
        return write_chunk(k, v, state, layers, rule, norm_weight, delta)


def _check(q, k, v, weights, layers, rule, norm_weight, delta, gamma, state, position, cu_seqlens) -> None:
    def shape(name: str, x: torch.Tensor, expected: tuple[int, ...], axes: str) -> None:
        check_shape("neural_memory", name, x, expected, axes)

    def fail(message: str) -> None:
        raise ValueError(f"neural_memory: {message}")

    if problems := rule.problems():
        fail("; ".join(problems))
    if q.dim() != 4 or 0 in q.shape:
        fail(f"q must have shape (B, T, H, K), all at least 1, got {tuple(q.shape)}")
    B, T, H, K = q.shape
    if v.dim() != 4 or v.shape[-1] < 1:
        fail(f"v must have shape (B, T, H, V) with V at least 1, got {tuple(v.shape)}")
    V = v.shape[-1]
    shape("k", k, (B, T, H, K), "(B, T, H, K)")
    shape("v", v, (B, T, H, V), "(B, T, H, V)")
    if rule.residual and K != V:
        fail(f"f(x) = x + … needs values as wide as keys, got K={K}, V={V}: take residual=False")
    if not weights or (rule.gated and len(weights) != 3):
        fail(f"a gated memory has three matrices and any other at least one, got {len(weights)}")
    inner = [w.shape[-1] for w in weights[:-1]]
    ins = [K, K, inner[0]] if rule.gated else [K, *inner]
    outs = [inner[0], inner[0], V] if rule.gated else [*inner, V]
    for i, (w, n, m) in enumerate(zip(weights, ins, outs)):
        shape(f"weights[{i}]", w, (H, n, m), "(H, in, out)")
    if len(layers) != len(weights):
        fail(f"there must be gates for each of {len(weights)} layers, or one Gates for all, got {len(layers)}")
    if len({layer.log_momentum is None for layer in layers}) > 1:
        fail("either all layers have a momentum or none")
    for i, (layer, m) in enumerate(zip(layers, outs)):
        for name, gate in layer._asdict().items():
            if gate is not None and gate.dim() == 4 and not rule.newton_schulz:
                shape(f"gates[{i}].{name}", gate, (B, T, H, m), "(B, T, H, out)")
            elif gate is not None:
                shape(f"gates[{i}].{name}", gate, (B, T, H), "(B, T, H)")
    if rule.newton_schulz and layers[0].log_momentum is None:
        fail("newton_schulz orthogonalises the momentum: give log_momentum")
    if norm_weight is not None:
        shape("norm_weight", norm_weight, (H, V), "(H, V)")
    for name, x, needed, why in (
        ("delta", delta, rule.bias == "huber", "bias='huber'"),
        ("gamma", gamma, rule.window > 1, "a window of more than one token"),
    ):
        if (x is not None) != needed:
            fail(f"{why} needs {name}" if needed else f"{name} is for {why} only")
        if x is not None:
            shape(name, x, (B, T, H), "(B, T, H)")
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    if position is not None:
        if state is None:
            fail("position counts the tokens that initial_state has seen: give both, or neither")
        shape("position", position, (sequences,), "(S,)")
    if state is not None:
        for i, (w, n, m) in enumerate(zip(state.weights, ins, outs, strict=True)):
            shape(f"initial_state.weights[{i}]", w, (sequences, H, n, m), "(S, H, in, out)")
        like = fresh_state(weights, 1, rule, layers[0].log_momentum is not None, V)
        for name, part, expected in zip(MemoryState._fields, state, like):
            if (part is None) != (expected is None):
                fail(f"initial_state.{name} must {'not be' if expected is None else 'be'} there for this rule")
