"""`riverrun bench head_rnn`: RNNs with a dense recurrent matrix within each head."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.benchmarks.contenders import LOOP_STEPS, compiled_loop, cudnn, linear_scans
from riverrun.kernels.block_linear import block_linear
from riverrun.kernels.head_rnn import head_rnn
from riverrun.kernels.head_rnn.cells import CELLS

CUDNN: dict[str, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}
FLASHRNN_BACKENDS = ("cuda_fused", "cuda", "triton_fused")


def inputs(case: Case, regime: str) -> Inputs:
    """x ~ N(0, 1) through a projection that keeps its variance; recurrent weights N(0, 1 / K)."""
    like: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    G, K = len(CELLS[case.variant].gates), case.D // case.H
    x = torch.randn(case.B, case.T, case.D, **like)
    projection = torch.randn(case.H, K, G, K, **like) / math.sqrt(K)
    bias = torch.zeros(G, case.D, **like)
    weight = torch.randn(G, case.H, K, K, **like) / math.sqrt(K)
    gates = (block_linear(x, projection) + bias).view(case.B, case.T, G, case.H, K)
    return {"x": x, "projection": projection, "bias": bias, "gates": gates, "weight": weight}


def ours(backend: str = "auto") -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        x, projection, bias, gates, weight = (inputs[n] for n in ("x", "projection", "bias", "gates", "weight"))

        def layer() -> torch.Tensor:
            u = block_linear(x, projection) + bias
            return head_rnn(u.view(gates.shape), weight, case.variant, backend=backend)[0]

        return Work(
            lambda: head_rnn(gates, weight, case.variant, backend=backend)[0],
            (gates, weight),
            layer,
            (x, projection, bias, weight),
        )

    return build


def compiled(inputs: Inputs, case: Case, load: Load) -> Work:
    gates, weight = inputs["gates"], inputs["weight"]
    cell = CELLS[case.variant]

    def step(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *state, u, weight = arguments
        rec = torch.einsum("bhk,ghkj->gbhj", state[-1], weight)
        return tuple(cell.step(tuple(state), u.unbind(1), rec.unbind(0)))

    zero = torch.zeros(case.B, case.H, case.D // case.H, device=case.device)
    return Work(compiled_loop(step, gates, (zero,) * len(cell.states), weight), (gates, weight))


def flashrnn(backend: str) -> Callable[..., Work]:
    """FlashRNN (Pöppel et al. 2024, arXiv 2412.07752). Its R is (G, H, out, in); its GRU has a bias and a recurrent
    gate of its own for n, which stand first."""

    def build(inputs: Inputs, case: Case, load: Load) -> Work:
        run = load("flashrnn").flashrnn
        gates, weight = inputs["gates"], inputs["weight"]
        order = [2, 0, 1] if case.variant == "gru" else list(range(len(weight)))
        biases = len(weight) + (case.variant == "gru")
        bias = torch.zeros(biases, *weight.shape[1:3], device=case.device, dtype=case.dtype)
        dtype = str(case.dtype).removeprefix("torch.")

        def forward() -> torch.Tensor:
            R = weight[order].transpose(2, 3).contiguous()
            return run(gates, R, bias, function=case.variant, backend=backend, dtype=dtype)[0][0]

        return Work(forward, (gates, weight))

    return build


def simple_gla(inputs: Inputs, case: Case, load: Load) -> Work:
    run = load("fla.ops.simple_gla").chunk_simple_gla
    like: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    q, k, v = (torch.randn(case.B, case.T, case.H, case.D // case.H, **like).requires_grad_() for _ in range(3))
    decay = torch.rand(case.B, case.T, case.H, device=case.device).log().requires_grad_()
    return Work(lambda: run(q, k, v, decay)[0], (q, k, v, decay))


def contenders(case: Case) -> list[Contender]:
    cap = f"at T ≤ {LOOP_STEPS} only"
    found = [
        Contender("riverrun auto", ours()),
        Contender("riverrun chunked torch", ours("chunked"), "a batched matrix product a step"),
        Contender("torch loop", ours("reference"), f"eager; {cap}", max_len=LOOP_STEPS),
        Contender("compiled torch loop", compiled, f"torch.compile of the step; {cap}", max_len=LOOP_STEPS),
    ]
    found += [Contender(f"flashrnn {name}", flashrnn(name), needs_cuda=True) for name in FLASHRNN_BACKENDS]
    if case.variant in CUDNN:
        found.append(cudnn(CUDNN[case.variant]))
    other = "other maths: a linear recurrence with a K × K state a head"
    found.append(Contender("fla chunk_simple_gla", simple_gla, other, same_maths=False, needs_cuda=True))
    return found + linear_scans()


HEAD_RNN = Benchmark(
    name="head_rnn",
    inputs=inputs,
    regimes={"fresh": "gates' pre-activations N(0, 1), recurrent weights N(0, 1 / head size)"},
    contenders=contenders,
    reference=ours("reference"),
    forward_numbers=lambda case: len(CELLS[case.variant].gates) + 1,
    backward_numbers=lambda case: 2 * len(CELLS[case.variant].gates) + 1,
    formula="forward G gates + h = G + 1 numbers an element; backward G gates + dL/dh + G gradients = 2 G + 1",
    variants=tuple(CELLS),
    head_counts=(8, 16, 32, 64, 128),
)
