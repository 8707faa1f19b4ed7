"""`riverrun bench gated_delta` and `ssd`: linear recurrences with matrix states."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.gated_delta import gated_delta
from riverrun.kernels.ssd import ssd

STEPS = {"n=1": 1, "n=2": 2, "n=3": 3, "n=1 V=2K": 1}  # Householder steps
STATE_SIZES = {f"N={n}": n for n in (128, 16, 64, 256)}  # of ssd, in one group


def sdpa() -> Contender:
    """Causal attention of the same width and heads."""

    def build(inputs: Inputs, case: Case, load: Load) -> Work:
        like: dict[str, Any] = {"device": case.device, "dtype": case.dtype, "requires_grad": True}
        q, k, v = (torch.randn(case.B, case.H, case.T, case.D // case.H, **like) for _ in range(3))
        return Work(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))

    return Contender("torch SDPA", build, "other maths: causal attention of the same width", same_maths=False)


# gated_delta


def value_ratio(case: Case) -> int:
    """V / K."""
    return 2 if case.variant.endswith("V=2K") else 1


def delta_inputs(case: Case, regime: str) -> Inputs:
    """Heads with K = D / H, and V as large or twice that; keys get unit length in the op; β in [0, 1], or twice that
    where states are to be tracked."""
    n, K = STEPS[case.variant], case.D // case.H
    like: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    beta = torch.rand(case.B, case.T, n, case.H, device=case.device)
    return {
        "q": torch.randn(case.B, case.T, case.H, K, **like),
        "k": torch.randn(case.B, case.T, n, case.H, K, **like),
        "v": torch.randn(case.B, case.T, n, case.H, K * value_ratio(case), **like),
        "beta": 2 * beta if regime == "reflections" else beta,
        "g": F.logsigmoid(torch.randn(case.B, case.T, case.H, device=case.device) + 3),
    }


def delta_ours(backend: str) -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        q, k, v, beta, g = leaves = tuple(inputs.values())
        beta_max = 1.0 if beta.detach().max() <= 1 else 2.0
        return Work(
            lambda: gated_delta(q, k, v, beta, g, qk_l2norm=True, beta_max=beta_max, backend=backend)[0], leaves
        )

    return build


def fla_delta(inputs: Inputs, case: Case, load: Load) -> Work:
    q, k, v, beta, g = leaves = tuple(inputs.values())
    n = STEPS[case.variant]
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True}
    # it refuses gated backward passes where it knows Triton to miscompile them, which take their time all the same
    vars(load("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True
    if n == 1:
        rule = load("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        one = [x[:, :, 0] for x in (k, v, beta)]
        return Work(lambda: rule(q, one[0], one[1], g=g, beta=one[2], **options)[0], leaves)
    product = load("fla.ops.gated_delta_product").chunk_gated_delta_product
    steps = [x.flatten(1, 2) for x in (k, v, beta)]
    return Work(lambda: product(q, steps[0], steps[1], g, steps[2], num_householder=n, **options)[0], leaves)


def delta_contenders(case: Case) -> list[Contender]:
    return [
        Contender("riverrun auto", delta_ours("auto")),
        Contender("riverrun chunked torch", delta_ours("chunked")),
        Contender(
            "fla",
            fla_delta,
            "chunk_gated_delta_rule, or _product; its states in bfloat16; timed as well where it "
            "would refuse to run, since Triton miscompiles its gradients: their errors show that",
            needs_cuda=True,
        ),
        sdpa(),
    ]


GATED_DELTA = Benchmark(
    name="gated_delta",
    inputs=delta_inputs,
    regimes={
        "decaying": "β uniform in [0, 1]: gated DeltaNet and DeltaProduct for language",
        "reflections": "β uniform in [0, 2]: for state tracking; our kernels multiply exactly here",
    },
    contenders=delta_contenders,
    reference=delta_ours("reference"),
    forward_numbers=lambda case: (1 + STEPS[case.variant]) * (1 + value_ratio(case)),
    backward_numbers=lambda case: 2 + 2 * STEPS[case.variant] + (1 + 2 * STEPS[case.variant]) * value_ratio(case),
    formula="forward q, n k, n v, o; backward q, n k, n v, dO, dq, n dk, n dv",
    sequences=("q", "k", "v", "beta", "g"),
    variants=tuple(STEPS),
    heads=16,
    head_counts=(8, 16, 32, 64),
)


# ssd


def ssd_inputs(case: Case, regime: str) -> Inputs:
    """Step sizes and decays as Mamba-2 starts: dt log-uniform in [0.001, 0.1], A in −[1, 16]."""
    like: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    wide: dict[str, Any] = {"device": case.device}
    return {
        "x": torch.randn(case.B, case.T, case.H, case.D // case.H, **like),
        "dt": 10 ** (-3 + 2 * torch.rand(case.B, case.T, case.H, **wide)),
        "A": -1 - 15 * torch.rand(case.H, **wide),
        "B": torch.randn(case.B, case.T, 1, STATE_SIZES[case.variant], **like),
        "C": torch.randn(case.B, case.T, 1, STATE_SIZES[case.variant], **like),
        "D": torch.ones(case.H, **wide),
    }


def ssd_ours(backend: str) -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        x, dt, A, B, C, D = leaves = tuple(inputs.values())
        return Work(lambda: ssd(x, dt, A, B, C, D, backend=backend)[0], leaves)

    return build


def mamba(inputs: Inputs, case: Case, load: Load) -> Work:
    scan = load("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    x, dt, A, B, C, D = leaves = tuple(inputs.values())
    return Work(lambda: scan(x, dt, A, B, C, chunk_size=128, D=D), leaves)


def ssd_contenders(case: Case) -> list[Contender]:
    return [
        Contender("riverrun auto", ssd_ours("auto")),
        Contender("riverrun chunked torch", ssd_ours("chunked")),
        Contender("mamba_ssm", mamba, "mamba_chunk_scan_combined, chunks of 128", needs_cuda=True),
        sdpa(),
    ]


SSD = Benchmark(
    name="ssd",
    inputs=ssd_inputs,
    regimes={"fresh": "dt log-uniform in [0.001, 0.1], A uniform in −[1, 16]: as Mamba-2 starts"},
    contenders=ssd_contenders,
    reference=ssd_ours("reference"),
    forward_numbers=lambda case: 2 + 2 * STATE_SIZES[case.variant] / case.D,
    backward_numbers=lambda case: 3 + 4 * STATE_SIZES[case.variant] / case.D,
    formula="forward x, y, and B, C for all heads; backward x, B, C, dY, dx, dB, dC",
    sequences=("x", "dt", "B", "C"),
    variants=tuple(STATE_SIZES),
    width=4096,
    heads=64,
    head_counts=(32, 64, 128),
)
