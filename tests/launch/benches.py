"""What the tests of `riverrun bench` share: small cases, and calls of its parts."""

from pathlib import Path

import torch
from typer.testing import CliRunner

from riverrun.kernels.benchmarks import BENCHMARKS, run
from riverrun.kernels.benchmarks.benchmark import Case
from riverrun.launch import cli
from riverrun.modeling.benchmarks import LAYERS

ROOT = Path(__file__).parents[2]
TINY = ["--batch", "1", "--seq-len", "32", "--width", "16", "--heads", "2", "--device", "cpu", "--dtype", "fp32",
        "--repeats", "2"]  # fmt: skip
RNNS = [("para_gru", ""), ("para_lstm", ""), *(("head_rnn", cell) for cell in BENCHMARKS["head_rnn"].variants)]
LOSS = [("linear_cross_entropy", "32768")]
MEMORY_BOUND = [(op, v) for op in ("diagonal_scan", "causal_conv1d", "gated_rms_norm") for v in BENCHMARKS[op].variants]
LINEAR = [(op, variant) for op in ("ssd", "gated_delta") for variant in BENCHMARKS[op].variants]
MEMORY = [("neural_memory", variant) for variant in BENCHMARKS["neural_memory"].variants]
WITH_PEERS = [("mamba2_layer", ""), *(("gated_delta_layer", n) for n in LAYERS["gated_delta_layer"].variants)]
WHOLE = [*WITH_PEERS, *(("titans_lmm_layer", memory) for memory in LAYERS["titans_lmm_layer"].variants)]
ALL = BENCHMARKS | LAYERS


def invoke(*args):
    env = {"COLUMNS": "240", "TERM": "dumb"}
    return CliRunner().invoke(cli.app, ["bench", *map(str, args)], env=env)


def case_of(cell="", T=40):
    return Case(2, T, 16, 2, torch.float32, torch.device("cpu"), cell)


def nothing(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def compare(benchmark, case, **options):
    return {r.name: r for r in run.compare(benchmark, case, "fresh", nothing, repeats=2, **options)}


def errors(op, case, build, inputs=None):
    """Of one contender, against float64."""
    benchmark = ALL[op]
    inputs = inputs or run.make_inputs(benchmark, case, next(iter(benchmark.regimes)))
    double = run.leaves(inputs, torch.float64)
    got, want = build(inputs, case, nothing), benchmark.reference(double, case)
    return run._errors(run._outcome(got, case.dtype), run._outcome(want, case.dtype))
