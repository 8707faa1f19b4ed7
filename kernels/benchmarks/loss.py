"""`riverrun bench linear_cross_entropy`: the head and the loss of a language model."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.linear_cross_entropy import linear_cross_entropy

VOCABULARIES = ("32768", "50304", "128256")
Z_LOSS = 1e-4


def inputs(case: Case, regime: str) -> Inputs:
    weight = torch.randn(int(case.variant), case.D, device=case.device, dtype=case.dtype) / math.sqrt(case.D)
    return {
        "hidden": torch.randn(case.B, case.T, case.D, device=case.device, dtype=case.dtype),
        "weight": weight,
        "targets": torch.randint(0, len(weight), (case.B, case.T), device=case.device),
    }


def _work(inputs: Inputs, loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Work:
    hidden, weight, targets = inputs.values()

    def run() -> torch.Tensor:
        return loss(hidden.flatten(0, 1), weight, targets.flatten())

    return Work(run, (hidden, weight), run, (hidden, weight))


def ours(backend: str) -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            out = linear_cross_entropy(hidden, weight, targets, z_loss=Z_LOSS, backend=backend)
            return out.loss + out.z_loss

        return _work(inputs, loss)

    return build


def full(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum") + Z_LOSS * logits.logsumexp(1).square().sum()

    return _work(inputs, loss)


def liger(inputs: Inputs, case: Case, load: Load) -> Work:
    function = load("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return function.apply(hidden, weight, targets, None, None, -100, Z_LOSS, 0.0, "sum")[0]

    return _work(inputs, loss)


def contenders(case: Case) -> list[Contender]:
    return [
        Contender("riverrun auto", ours("auto")),
        Contender("riverrun chunked torch", ours("chunked")),
        Contender("torch, all logits", full),
        Contender("Liger", liger, "computes the gradients in the forward pass: compare the sum", needs_cuda=True),
    ]


LINEAR_CROSS_ENTROPY = Benchmark(
    name="linear_cross_entropy",
    inputs=inputs,
    regimes={"fresh": "hidden N(0, 1), weight N(0, 1 / D), uniform targets; the layer's column is forward + backward"},
    contenders=contenders,
    reference=full,
    forward_numbers=lambda case: 1 + int(case.variant) / (case.B * case.T),
    backward_numbers=lambda case: 2 + 2 * int(case.variant) / (case.B * case.T),
    formula="the hidden states and the weight, and their gradients; the matrix products take longer",
    sequences=("hidden", "targets"),
    variants=VOCABULARIES,
)
