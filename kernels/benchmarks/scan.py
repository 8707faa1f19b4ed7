"""`riverrun bench diagonal_scan`: h_t = a_t h_{t−1} + x_t, channel by channel."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.benchmarks.contenders import LOOP_STEPS
from riverrun.kernels.diagonal_scan import diagonal_scan

COMPLEX_BYTES = torch.complex64.itemsize


def inputs(case: Case, regime: str) -> Inputs:
    """x and a (B, T, D); complex ones, which there are in float32 only, as pairs of numbers on a last axis."""
    shape = (case.B, case.T, case.D)
    like: dict[str, Any] = {"device": case.device}
    decay = torch.sigmoid(torch.randn(shape, **like) + 3)
    if case.variant == "real":
        return {"x": torch.randn(shape, **like, dtype=case.dtype), "a": decay.to(case.dtype)}
    angle = 2 * math.pi * torch.rand(shape, **like)
    return {"x": torch.randn(*shape, 2, **like), "a": torch.view_as_real(torch.polar(decay, angle))}


def ours(backend: str) -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        leaves = inputs["x"], inputs["a"]

        def run() -> torch.Tensor:
            if case.variant == "real":
                return diagonal_scan(*leaves, backend=backend)[0]
            x, a = map(torch.view_as_complex, leaves)
            return torch.view_as_real(diagonal_scan(x, a, backend=backend)[0])

        return Work(run, leaves, run, leaves)

    return build


def hgrn(function: str) -> Callable[..., Work]:
    """fla's takes the logarithms of decays, and gives the gradients of these: a · dL/da."""

    def build(inputs: Inputs, case: Case, load: Load) -> Work:
        scan = getattr(load("fla.ops.hgrn"), function)
        x, a = inputs["x"], inputs["a"].detach()
        leaves = x, a.log().requires_grad_()

        def run() -> torch.Tensor:
            return scan(*leaves)[0]

        def arrange(grads: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            return grads[0], grads[1].float() / a.float()

        return Work(run, leaves, run, leaves, arrange=arrange)

    return build


def contenders(case: Case) -> list[Contender]:
    found = [
        Contender("riverrun auto", ours("auto")),
        Contender("riverrun chunked torch", ours("chunked")),
        Contender("torch loop", ours("reference"), f"eager; at T ≤ {LOOP_STEPS} only", max_len=LOOP_STEPS),
    ]
    if case.variant == "real":
        note = "takes log a, rounded to the same type"
        found += [
            Contender(f"fla {function}", hgrn(function), note, needs_cuda=True)
            for function in ("fused_recurrent_hgrn", "chunk_hgrn")
        ]
    return found


def numbers(count: int) -> Callable[[Case], float]:
    """`count` numbers an element, of the inputs' type or complex ones, in numbers of the case's type."""
    return lambda case: count if case.variant == "real" else count * COMPLEX_BYTES / case.dtype.itemsize


DIAGONAL_SCAN = Benchmark(
    name="diagonal_scan",
    inputs=inputs,
    regimes={
        "fresh": "x N(0, 1), a = sigmoid(N(3, 1)), a memory of about 20 tokens; complex: that modulus, any angle, "
        "complex64 whatever the type; the layer's column is forward + backward"
    },
    contenders=contenders,
    reference=ours("reference"),
    forward_numbers=numbers(3),
    backward_numbers=numbers(5),
    formula="forward x + a + h = 3 numbers an element; backward a + h + dL/dh + dx + da = 5; complex ones of 8 bytes",
    sequences=("x", "a"),
    variants=("real", "complex"),
    heads=1,
)
