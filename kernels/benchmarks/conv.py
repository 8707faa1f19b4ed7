"""`riverrun bench causal_conv1d`: the short convolution before a recurrence, with bias and SiLU."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.causal_conv1d import causal_conv1d

TAPS = 4
SEED = 0  # of the documents

Convolve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x (B, T, D), weight (D, W), bias (D,) → y (B, T, D)."""


def inputs(case: Case, regime: str) -> Inputs:
    """x (B, T, D), or the same tokens in one row (1, B · T, D) with `cu_seqlens`; the weights as models start."""
    like: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    made = {
        "x": torch.randn(case.B, case.T, case.D, **like),
        "weight": (2 * torch.rand(case.D, TAPS, **like) - 1) / math.sqrt(TAPS),
        "bias": (2 * torch.rand(case.D, **like) - 1) / math.sqrt(TAPS),
    }
    if case.variant == "documents":
        made |= {"x": made["x"].view(1, -1, case.D), "cu_seqlens": documents(case)}
    return made


def documents(case: Case) -> torch.Tensor:
    """(S + 1,) int32, the bounds of documents over B · T tokens: T / 8 long on average, about a quarter of them of a
    single token. The same on every device."""
    tokens = case.B * case.T
    starts = 1 + torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(SEED))[: 6 * case.B]
    cuts = torch.cat([torch.tensor([0, tokens]), starts, starts[::3] + 1])
    return cuts.unique().to(case.device, torch.int32)


def bounds_of(inputs: Inputs) -> torch.Tensor | None:
    """`cu_seqlens` as far as x reaches, which errors are measured on the first tokens of; None without documents."""
    if "cu_seqlens" not in inputs:
        return None
    bounds, tokens = inputs["cu_seqlens"], inputs["x"].shape[1]
    return torch.cat([bounds[bounds < tokens], bounds.new_tensor([tokens])])


def _work(inputs: Inputs, convolve: Convolve) -> Work:
    leaves = inputs["x"], inputs["weight"], inputs["bias"]

    def run() -> torch.Tensor:
        return convolve(*leaves)

    return Work(run, leaves, run, leaves)


def ours(backend: str) -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        options: dict[str, Any] = {"activation": "silu", "cu_seqlens": bounds_of(inputs), "backend": backend}
        return _work(inputs, lambda x, weight, bias: causal_conv1d(x, weight, bias, **options)[0])

    return build


def torch_conv1d(inputs: Inputs, case: Case, load: Load) -> Work:
    def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.conv1d(x.mT, weight[:, None], bias, padding=TAPS - 1, groups=case.D)[..., : case.T]
        return F.silu(y).mT.contiguous()  # as whatever comes next wants it

    return _work(inputs, convolve)


def tri_dao(inputs: Inputs, case: Case, load: Load) -> Work:
    """The CUDA package. It takes (B, D, T), here with neighbouring channels, and the document of every token."""
    run = load("causal_conv1d").causal_conv1d_fn
    bounds, seq_idx = bounds_of(inputs), None
    if bounds is not None:
        lengths = bounds.diff()
        number = torch.arange(len(lengths), dtype=torch.int32, device=case.device)
        seq_idx = number.repeat_interleave(lengths)[None]
    return _work(inputs, lambda x, weight, bias: run(x.mT, weight, bias, seq_idx=seq_idx, activation="silu").mT)


def fla(inputs: Inputs, case: Case, load: Load) -> Work:
    run = load("fla.modules.convolution").causal_conv1d
    bounds = bounds_of(inputs)
    options: dict[str, Any] = {"activation": "silu", "cu_seqlens": None if bounds is None else bounds.long()}
    return _work(inputs, lambda x, weight, bias: run(x, weight, bias, **options)[0])


def contenders(case: Case) -> list[Contender]:
    found = [Contender("riverrun auto", ours("auto")), Contender("riverrun chunked torch", ours("chunked"))]
    if case.variant == "rows":
        found.append(Contender("torch conv1d", torch_conv1d, "depthwise, then SiLU; both transposes are in its time"))
    return [
        *found,
        Contender("causal_conv1d", tri_dao, "causal_conv1d_fn, neighbouring channels", needs_cuda=True),
        Contender("fla", fla, "its causal_conv1d in Triton", needs_cuda=True),
    ]


CAUSAL_CONV1D = Benchmark(
    name="causal_conv1d",
    inputs=inputs,
    regimes={
        "fresh": f"x N(0, 1), {TAPS} taps and bias uniform in ±1/2, SiLU; the layer's column is forward + backward"
    },
    contenders=contenders,
    reference=ours("reference"),
    forward_numbers=lambda case: 2,
    backward_numbers=lambda case: 3,
    formula="forward x + y = 2 numbers an element; backward x + dL/dy + dx = 3; the weights are few",
    sequences=("x",),
    variants=("rows", "documents"),
    heads=1,
)
