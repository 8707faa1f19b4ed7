"""`riverrun bench para_gru` and `para_lstm`: the diagonal nonlinear RNNs of ParaRNN (arXiv 2510.21450)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.benchmarks.contenders import LOOP_STEPS, compiled_loop, cudnn, linear_scans
from riverrun.kernels.block_linear import block_linear
from riverrun.kernels.common.backend import resolve_backend
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_gru.reference import para_gru_step
from riverrun.kernels.para_lstm import para_lstm
from riverrun.kernels.para_lstm.reference import para_lstm_step

OPS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {"para_gru": para_gru, "para_lstm": para_lstm}
CHUNKS = (2, 8, 32)
SHORTEST_CHUNK = 16
BOUND = 0.5  # of the recurrent weights, as the paper trains language models
RETENTION = 4.0
REGIMES = {
    "fresh": "gates' pre-activations N(0, 1), recurrent weights uniform in ±0.5: a memory of a few tokens",
    "retentive": "the same, and the bias of the gate that overwrites the state at −4: a memory of about 50 tokens",
}


def inputs(op: str, case: Case, regime: str) -> Inputs:
    """x ~ N(0, 1) through a projection that keeps its variance; the gates hold its outcome with the bias added."""
    like: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    block = case.D // case.H
    x = torch.randn(case.B, case.T, case.D, **like)
    projection = torch.randn(case.H, block, 3, block, **like) / math.sqrt(block)
    bias = torch.zeros(3, case.D, **like)
    if regime == "retentive":
        bias[0] = RETENTION if op == "para_lstm" else -RETENTION  # f keeps, z overwrites
    made = {"x": x, "projection": projection, "bias": bias, "gates": block_linear(x, projection) + bias}
    made["weight"] = (torch.rand(3, case.D, device=case.device) * 2 - 1) * BOUND
    if op == "para_lstm":
        made["peephole"] = (torch.rand(2, case.D, device=case.device) * 2 - 1) * BOUND
    return made


def ours(op: str, backend: str = "auto", chunks: int | None = None) -> Callable[..., Work]:
    """Through the public function; `chunks=1` steps through time."""

    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        options: dict[str, Any] = {"backend": backend, "chunk_size": chunks and math.ceil(case.T / chunks)}
        x, projection, bias, gates = (inputs[name] for name in ("x", "projection", "bias", "gates"))
        weights = _weights(inputs)
        return Work(
            lambda: OPS[op](gates, *weights, **options)[0],
            (gates, *weights),
            lambda: OPS[op](block_linear(x, projection), *weights, bias=bias, **options)[0],
            (x, projection, bias, *weights),
        )

    return build


def compiled(op: str) -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load) -> Work:
        gates, weights = inputs["gates"], _weights(inputs)
        state = torch.zeros(case.B, case.D, device=case.device)
        if op == "para_lstm":
            return Work(compiled_loop(para_lstm_step, gates, (state, state), *weights), (gates, *weights))
        return Work(compiled_loop(para_gru_step, gates, (state,), *weights), (gates, *weights))

    return build


def pararnn(op: str) -> Callable[..., Work]:
    """ParaRNN's own CUDA: the fused kernels, which take float32 in the layout (B, D, T, 3), and its whole cell."""
    kind, cell_name = {
        "para_gru": ("gru_diag_mh", "GRUDiagMH"),
        "para_lstm": ("lstm_cifg_diag_mh", "LSTMCIFGDiagMH"),
    }[op]

    def build(inputs: Inputs, case: Case, load: Load) -> Work:
        package = load(f"pararnn.rnn_cell.{kind}")  # registers the operators
        kernels = torch.ops.parallel_reduce_cuda
        forward, backward = (getattr(kernels, f"fused_{way}_{kind}") for way in ("fwd", "bwd"))
        gates = inputs["gates"].detach().float().permute(0, 3, 1, 2).contiguous()
        weight, *peephole = (w.detach().float().t().contiguous() for w in _weights(inputs))
        arguments = (weight, gates, *peephole)
        states = forward(*arguments)  # (B, D, T), and (c, h) on a last axis in the LSTM
        upstream = torch.randn_like(states)

        config = getattr(package, f"{cell_name}Config")(
            state_dim=case.D, input_dim=case.D, num_heads=case.H, mode="parallel_FUSED", device=case.device,
            dtype=case.dtype,
        )  # fmt: skip
        cell = getattr(package, cell_name)(config)
        ours = {"A": "weight", "B": "projection", "b": "bias", "C": "peephole"}
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                parameter.copy_(inputs[ours[name]])
        x = inputs["x"]

        def run() -> torch.Tensor:
            out = forward(*arguments)
            return (out if op == "para_gru" else out[..., 1]).transpose(1, 2)

        return Work(run, (), lambda: cell(x), (x, *cell.parameters()), lambda _: backward(upstream, states, *arguments))

    return build


def contenders(op: str, case: Case) -> list[Contender]:
    backend = resolve_backend(op, "auto", torch.empty(0, dtype=case.dtype, device=case.device), case.T, has_triton=True)
    chosen = {None: "riverrun auto", 1: "riverrun sequential"} | {n: f"riverrun {n} chunks" for n in CHUNKS}
    found = [
        Contender(
            name,
            ours(op, chunks=n),
            _launch(case, n) if backend == "triton" else f"backend {backend}",
            min_len=1 if n in (None, 1) else n * SHORTEST_CHUNK,
        )
        for n, name in chosen.items()
    ]
    cap = f"at T ≤ {LOOP_STEPS} only"
    return [
        *found,
        Contender("riverrun chunked torch", ours(op, backend="chunked"), "shooting in vectorised torch"),
        Contender("torch loop", ours(op, backend="reference"), f"eager; {cap}", max_len=LOOP_STEPS),
        Contender("compiled torch loop", compiled(op), f"torch.compile of the step; {cap}", max_len=LOOP_STEPS),
        Contender("ParaRNN", pararnn(op), "3 Newton steps; kernels in float32; backward is the adjoint only",
                  needs_cuda=True),
        cudnn(nn.LSTM if op == "para_lstm" else nn.GRU),
        *linear_scans(),
    ]  # fmt: skip


def _launch(case: Case, chunks: int | None) -> str:
    """How the Triton kernels cut the case; they round the number of chunks, and have a limit to it."""
    from riverrun.kernels.common.triton_shooting import Launch

    size = chunks and math.ceil(case.T / chunks)
    launch = Launch.of(
        case.B, case.T, case.D, size, torch.cuda.get_device_properties(case.device).multi_processor_count
    )
    return f"Triton, {launch.chunks} chunk{'s' * (launch.chunks > 1)} of {launch.length}, {launch.block} channels each"


def _weights(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(inputs[name] for name in ("weight", "peephole") if name in inputs)


def _benchmark(op: str) -> Benchmark:
    return Benchmark(
        name=op,
        inputs=partial(inputs, op),
        regimes=REGIMES,
        contenders=partial(contenders, op),
        reference=ours(op, backend="reference"),
        forward_numbers=lambda case: 4,
        backward_numbers=lambda case: 7,
        formula="forward 3 gates + h = 4 numbers an element; backward 3 gates + dL/dh + 3 gradients = 7",
    )


PARA_GRU, PARA_LSTM = _benchmark("para_gru"), _benchmark("para_lstm")
