"""`riverrun bench neural_memory`: memories of one, two and three matrices, with gates as models have them at first.

The truth that errors are measured against is the chunked form in float64, which is tested against the step loop: this
keeps a memory's weights and their gradient for every token, more than there is room for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.benchmarks.linear import fla_delta, sdpa
from riverrun.kernels.common.memory_rule import DEEP_HALF_LIFE, LINEAR_HALF_LIFE, curvature
from riverrun.kernels.neural_memory import Gates, Rule, neural_memory
from riverrun.kernels.neural_memory.chunked import ONLINE_CHUNK
from riverrun.kernels.neural_memory.triton_path import Keep

MOMENTUM = 0.9  # η
HEAD = 128
PEER_CHUNKS = 512  # of a sequence: at each, titans-pytorch copies the weights after all those before


@dataclass(frozen=True)
class Form:
    """`expand`: inner width / head's; 0: one matrix. A memory with a residual has a norm too."""

    rule: Rule
    expand: int = 0
    head: int = HEAD


FORMS = {
    "linear": Form(Rule()),
    "linear b=64": Form(Rule(chunk_size=64)),
    "two layers": Form(Rule(chunk_size=64, residual=True), expand=4),
    "two layers b=16": Form(Rule(chunk_size=16, residual=True), expand=4),
    "chunk 2048": Form(Rule(chunk_size=2048, read="chunk", activation="silu", gated=True), expand=1, head=512),
}


def layer_sizes(form: Form, K: int) -> list[tuple[int, int]]:
    """(in, out) of the memory's matrices."""
    inner = form.expand * K
    if form.rule.gated:
        return [(K, inner), (K, inner), (inner, K)]
    return [(K, inner), (inner, K)] if inner else [(K, K)]


def rule_of(case: Case) -> Rule:
    """Nothing that is written in a chunk is read in it where reads are of its start: two chunks are the fewest."""
    rule = FORMS[case.variant].rule
    return replace(rule, chunk_size=min(rule.chunk_size, max(1, case.T // 2))) if rule.read == "chunk" else rule


def largest_step(form: Form, b: int) -> float:
    """θ / (1 − η) that is stable in chunks of b unit keys, even equal ones."""
    return 2 / (b * curvature(layer_sizes(form, form.head), form.rule.residual, form.rule.gated))


def forgotten(form: Form) -> float:
    """α."""
    return 1 - 2 ** (-1 / (DEEP_HALF_LIFE if form.expand else LINEAR_HALF_LIFE))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def inputs(case: Case, regime: str) -> Inputs:
    """Queries and keys of unit length; gates are sigmoids of what N(0, 1) adds to their biases, θ that of a step."""
    form, K = FORMS[case.variant], case.D // case.H

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=case.device)

    def gate(at: float) -> torch.Tensor:
        return logit(at) + normal(case.B, case.T, case.H)

    q, k = (F.normalize(normal(case.B, case.T, case.H, K), dim=-1).to(case.dtype) for _ in range(2))
    eta = gate(MOMENTUM)
    made = {
        "q": q,
        "k": k,
        "v": normal(case.B, case.T, case.H, K).to(case.dtype),
        "log_keep": F.logsigmoid(-gate(forgotten(form))),
        "log_momentum": F.logsigmoid(eta),
        "lr": gate(0.5).sigmoid() * largest_step(form, form.rule.chunk_size) * (1 - eta.sigmoid()),
    }
    for i, (n, m) in enumerate(layer_sizes(form, K)):
        made[f"weight_{i}"] = (normal(case.H, n, m) * n**-0.5).to(case.dtype)
    if form.rule.residual:
        made["norm_weight"] = torch.full((case.H, K), K**-0.5, device=case.device, dtype=case.dtype)
    return made


ALL_STATES = "the states of all chunks are kept for the backward pass"


def ours(backend: str, keep: Keep = "root") -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        q, k, v = (inputs[name] for name in "qkv")
        gates = Gates(inputs["log_keep"], inputs["lr"], inputs["log_momentum"])
        weights = tuple(x for name, x in inputs.items() if name.startswith("weight_"))
        options: dict[str, Any] = {"norm_weight": inputs.get("norm_weight"), "backend": backend, "keep": keep}
        return Work(
            lambda: neural_memory(q, k, v, weights, gates, rule=rule_of(case), **options)[0], tuple(inputs.values())
        )

    return build


def fla(inputs: Inputs, case: Case, load: Load) -> Work:
    """The step is the delta rule's β."""
    k, v, beta = (inputs[name].detach()[:, :, None].requires_grad_() for name in ("k", "v", "lr"))
    delta = {"q": inputs["q"], "k": k, "v": v, "beta": beta, "g": inputs["log_keep"]}
    return fla_delta(delta, replace(case, variant="n=1"), load)


def peer_chunk(case: Case) -> int:
    """Its memories are copied at every chunk: one of each token would not fit."""
    b = FORMS[case.variant].rule.chunk_size
    return ONLINE_CHUNK if b == 1 else b


def titans_pytorch(inputs: Inputs, case: Case, load: Load) -> Work:
    """Its keys are of length √K where ours are of one, so its steps are those by K."""
    form, K, chunk = FORMS[case.variant], case.D // case.H, peer_chunk(case)
    step = largest_step(form, chunk) * (1 - MOMENTUM)
    network = load("titans_pytorch.memory_models").MemoryMLP(
        K, depth=2 if form.expand else 1, expansion_factor=form.expand
    )
    memory = load("titans_pytorch").NeuralMemory(
        case.D, heads=case.H, dim_head=K, chunk_size=chunk, batch_size=chunk, model=network, qk_rmsnorm=True,
        pre_rmsnorm=False, mem_model_norm_add_residual=form.rule.residual, default_step_transform_max_lr=step / K,
        init_adaptive_step_bias=0.0, init_momentum_bias=logit(MOMENTUM),
        init_decay_bias=logit(forgotten(form)),
        store_memory_loss_fn=lambda f, v: (f - v).square().sum(-1) / 2,
    ).to(case.device, case.dtype)  # fmt: skip
    x = torch.randn(case.B, case.T, case.D, device=case.device, dtype=case.dtype, requires_grad=True)
    # those of `memory_model` itself are a form that is filled with the ones of each head
    parameters = [p for name, p in memory.named_parameters() if not name.startswith("memory_model.")]
    return Work(lambda: memory(x)[0], (x, *parameters))


def attention(case: Case) -> Contender:
    """Flash kernels know no heads as wide as those of large chunks."""
    found = sdpa()
    heads = max(case.H, case.D // HEAD)
    note = f"{found.note}, in {heads} heads"
    return replace(found, build=lambda i, c, load: found.build(i, replace(c, H=heads), load), note=note)


def contenders(case: Case) -> list[Contender]:
    form, chunk = FORMS[case.variant], peer_chunk(case)
    found = [Contender("riverrun auto", ours("auto"))]
    if not form.rule.gated:
        found.append(Contender("riverrun all states", ours("auto", keep="all"), ALL_STATES, needs_cuda=True))
    found += [
        Contender("riverrun chunked torch", ours("chunked")),
        Contender(
            "fla",
            fla,
            "other maths: chunk_gated_delta_rule of the same shape, a linear memory without momentum, which norms its "
            "keys; its states in bfloat16",
            same_maths=False,
            needs_cuda=True,
        ),
    ]
    if not form.rule.gated:
        note = (
            f"other maths: its NeuralMemory, chunks of {chunk}: one forgetting and one momentum a chunk, reads of the "
            "memory before the chunk; weights and momentum in the inputs' type; its projections are in every figure"
        )
        peer = Contender("titans-pytorch", titans_pytorch, note, same_maths=False)
        found.append(replace(peer, min_len=chunk, max_len=PEER_CHUNKS * chunk))
    return [replace(c, build=_in_one_go(c.build)) for c in (*found, attention(case))]


def _in_one_go(build: Callable[..., Work]) -> Callable[..., Work]:
    """The layer's figure is forward and backward."""

    def built(inputs: Inputs, case: Case, load: Load) -> Work:
        work = build(inputs, case, load)
        return replace(work, layer=work.forward, layer_leaves=work.leaves)

    return built


def flops(case: Case) -> float:
    """Per token and layer of n × m, products with the weights to learn (with the momentum too, online), and back
    through all but the first layers; with both to read, or with the weights alone at a chunk's start; with both to
    write. And the pairs of a chunk."""
    form, rule, K = FORMS[case.variant], rule_of(case), case.D // case.H
    online = rule.chunk_size == 1
    pairs = 2 * min(ONLINE_CHUNK if online else rule.chunk_size, case.T)
    first, reads = 2 if rule.gated else 1, 1 if rule.read == "chunk" else 2
    total = 0.0
    for i, (n, m) in enumerate(layer_sizes(form, K)):
        total += 2 * n * m * (1 + online + (i >= first) + reads + 2)
        if rule.read != "chunk":
            total += pairs * (n + m)
    if online:
        total += pairs * 2 * K  # the system of errors, and its solution
    return case.B * case.T * case.H * total


def weights(case: Case) -> float:
    """An element."""
    sizes = layer_sizes(FORMS[case.variant], case.D // case.H)
    return case.H * sum(n * m for n, m in sizes) / case.elements


NEURAL_MEMORY = Benchmark(
    name="neural_memory",
    inputs=inputs,
    regimes={
        "fresh": f"unit keys; a half-life of {LINEAR_HALF_LIFE:.0f} tokens, or {DEEP_HALF_LIFE:.0f} of a deep memory, "
        f"and η of {MOMENTUM}, as gates of random tokens; θ half of 2 (1 − η) / (b κ), κ the memory's curvature; the "
        "layer's column is forward + backward in one go",
    },
    contenders=contenders,
    reference=ours("chunked"),
    forward_numbers=lambda case: 4 + weights(case),
    backward_numbers=lambda case: 7 + 2 * weights(case),
    formula="forward q, k, v, o, the weights; backward q, k, v, dO, dq, dk, dv, the weights, their gradients (states "
    "stay where they are, and the matrix products take longer)",
    sequences=("q", "k", "v", "log_keep", "log_momentum", "lr"),
    variants=tuple(FORMS),
    heads=lambda D, variant: max(1, D // FORMS[variant].head),
    head_counts=(4, 8, 16, 32),
    flops=flops,
)
