"""`riverrun bench gated_rms_norm`: the norm and the gate after a recurrence."""

from collections.abc import Callable
from typing import Any

import torch

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.gated_rms_norm import gated_rms_norm

EPS = 1e-5
HEAD = 128  # channels, if nothing else is asked for
NORM_FIRST = {"after gate": False, "before gate, heads": True}  # Mamba-2's, of all channels; gated DeltaNet's, a head's

Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x and gate (…, channels), weight (channels,) → (…, channels)."""


def inputs(case: Case, regime: str) -> Inputs:
    """x and gate (B, T, D) with a weight a channel, or (B, T, H, D / H) with one weight for all heads."""
    like: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    shape = (case.H, case.D // case.H) if NORM_FIRST[case.variant] else (case.D,)
    return {
        "x": torch.randn(case.B, case.T, *shape, **like),
        "gate": torch.randn(case.B, case.T, *shape, **like),
        "weight": 0.5 + torch.rand(shape[-1], **like),
    }


def _work(inputs: Inputs, norm: Norm) -> Work:
    x, gate, weight = leaves = tuple(inputs.values())

    def run() -> torch.Tensor:
        return norm(x, gate, weight)

    return Work(run, leaves, run, leaves)


def ours(backend: str) -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        options: dict[str, Any] = {"eps": EPS, "norm_before_gate": NORM_FIRST[case.variant], "backend": backend}
        return _work(inputs, lambda x, gate, weight: gated_rms_norm(x, gate, weight, **options))

    return build


def mamba(inputs: Inputs, case: Case, load: Load) -> Work:
    run = load("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
    options: dict[str, Any] = {"eps": EPS, "norm_before_gate": NORM_FIRST[case.variant]}
    return _work(inputs, lambda x, gate, weight: run(x, weight, None, z=gate, **options))


def fla(inputs: Inputs, case: Case, load: Load) -> Work:
    """The functions of its FusedRMSNormGated, and of the RMSNormGated in its Mamba-2."""
    if NORM_FIRST[case.variant]:
        fused = load("fla.modules.fused_norm_gate").rms_norm_gated
        return _work(inputs, lambda x, gate, weight: fused(x, gate, weight, None, eps=EPS))
    after = load("fla.modules.layernorm_gated").rmsnorm_fn
    return _work(inputs, lambda x, gate, weight: after(x, weight, None, z=gate, eps=EPS, norm_before_gate=False))


def contenders(case: Case) -> list[Contender]:
    fla_function = "rms_norm_gated" if NORM_FIRST[case.variant] else "rmsnorm_fn"
    return [
        Contender("riverrun auto", ours("auto")),
        Contender("riverrun chunked torch", ours("chunked"), "its plain form"),
        Contender("mamba_ssm", mamba, "rmsnorm_fn", needs_cuda=True),
        Contender("fla", fla, fla_function, needs_cuda=True),
    ]


GATED_RMS_NORM = Benchmark(
    name="gated_rms_norm",
    inputs=inputs,
    regimes={"fresh": "x and gate N(0, 1), weight uniform in [0.5, 1.5]; the layer's column is forward + backward"},
    contenders=contenders,
    reference=ours("reference"),
    forward_numbers=lambda case: 3,
    backward_numbers=lambda case: 5,
    formula="forward x + gate + y = 3 numbers an element; backward x + gate + dL/dy + dx + dgate = 5",
    sequences=("x", "gate"),
    variants=tuple(NORM_FIRST),
    heads=lambda width, variant: max(1, width // HEAD),
)
