"""`riverrun bench neural_memory`: its truth, its contenders, and the FLOPs that stand beside its times."""

import json
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from riverrun.kernels.benchmarks import BENCHMARKS, run
from riverrun.kernels.benchmarks.benchmark import Case
from riverrun.kernels.benchmarks.memory import FORMS, ours, peer_chunk, rule_of
from riverrun.kernels.benchmarks.timing import Time
from riverrun.launch import bench_report
from riverrun.launch.bench_report import Report
from tests.launch.benches import ALL, MEMORY, case_of, errors, invoke, nothing

BENCHMARK = BENCHMARKS["neural_memory"]
VARIANTS = [variant for _, variant in MEMORY]


def inputs_of(case):
    return run.make_inputs(BENCHMARK, case, "fresh")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_truth_is_the_step_loops(variant):
    assert max(errors("neural_memory", case_of(variant, T=20), ours("reference")).values()) < 1e-4


@pytest.mark.parametrize(("variant", "heads"), [("two layers b=16", 1), ("chunk 2048", 1), ("linear", 2)])
def test_a_run_has_every_figure(variant, heads, tmp_path):
    shape = ["--batch", "1", "--seq-len", "64", "--width", "256", "--dtype", "fp32", "--repeats", "2"]
    options = [*shape, "--device", "cpu", "--sweep-min", "64", "--sweep-max", "64", "--keep-caches", "--out", tmp_path]
    options += ["--heads", "1"] if variant == "two layers b=16" else []
    result = invoke("neural_memory", *options, "--variant", variant)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "neural_memory.json").read_text())
    regime = document["regimes"]["fresh"]
    assert regime["case"]["H"] == heads  # of 128 channels, or one narrower than 512
    found = {c["name"]: c for c in regime["contenders"]}
    names = ["riverrun auto", "riverrun all states", "riverrun chunked torch", "fla", "titans-pytorch", "torch SDPA"]
    absent = ["riverrun all states", "titans-pytorch"] if variant == "chunk 2048" else []
    assert list(found) == [name for name in names if name not in absent]
    for name in {"riverrun all states", "fla"} & found.keys():
        assert found.pop(name)["skipped"] == "needs CUDA"
    for name, c in found.items():
        assert all(c[what]["median"] > 0 for what in ("forward", "backward", "layer")), c["skipped"]
        if name.startswith("riverrun"):
            assert c["error_len"] == 64 and all(0 < e < 1e-4 for e in c["error"].values())
    speeds = {name: speed for name, speed in regime["flops_per_second"].items() if speed}
    assert set(speeds) == {"riverrun auto", "riverrun chunked torch"}
    flops = BENCHMARK.flops(Case(1, 64, 256, heads, torch.float32, torch.device("cpu"), variant))
    for name, speed in speeds.items():
        assert speed["forward"] == pytest.approx(flops / (found[name]["forward"]["median"] / 1e3))
        assert speed["layer"] == pytest.approx(3 * flops / (found[name]["layer"]["median"] / 1e3))
    assert [p["case"]["T"] for p in document["sweeps"]["length"]] == [64]
    assert [p["case"]["H"] for p in document["sweeps"]["heads"]] == [4, 8, 16, 32]
    assert all(p["contenders"][0]["backward"]["median"] > 0 for sweep in document["sweeps"].values() for p in sweep)
    markdown = (tmp_path / "neural_memory.md").read_text()
    for text in ("| forward TFLOP/s ", "layer TFLOP/s |", f"- TFLOP/s: {flops:.3g} FLOPs of a forward pass"):
        assert text in markdown
    assert document["peak_flops"] is None and "in brackets" not in markdown


def test_heads_follow_from_the_width_and_the_variant():
    for benchmark in ALL.values():
        for variant in benchmark.variants or [""]:
            assert benchmark.width % benchmark.heads_of(benchmark.width, variant) == 0
    assert [BENCHMARK.heads_of(2048, variant) for variant in VARIANTS] == [16, 16, 16, 16, 4]


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_of_the_chunked_form(variant):
    case = case_of(variant, T=128)
    b, K = peer_chunk(case), case.D // case.H
    work = ours("chunked")(inputs_of(case), case)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work.forward()
    counted = counter.get_total_flops()
    if rule_of(case).read != "chunk":  # gates of pairs, which are not among them
        counted -= case.B * case.H * (case.T // b) * (2 * b**3 + 2 * b**2)
    if variant == "linear":  # torch does not count those of a triangular system
        counted += case.B * case.H * case.T * 2 * b * K
    assert BENCHMARK.flops(case) == counted


def test_speeds_stand_beside_the_times_with_their_shares_of_the_peak(monkeypatch):
    case = replace(case_of("two layers"), dtype=torch.bfloat16)
    flops = BENCHMARK.flops(case)
    ours = run.Result("riverrun auto", forward=Time(1e-3, 1e-3, 1), layer=Time(6e-3, 6e-3, 1))  # in milliseconds
    report = Report(BENCHMARK, case, 1e12, 1, "", cold=True)
    report.results["fresh"] = [ours, run.Result("torch SDPA", forward=Time(1.0, 1.0, 1))]
    assert report.speeds("fresh") == {
        "riverrun auto": {"forward": pytest.approx(1e6 * flops), "layer": pytest.approx(5e5 * flops)}
    }
    monkeypatch.setattr(
        bench_report, "peak_flops", lambda config, device, dtype: 4e6 * flops if dtype == "bf16" else None
    )
    rows = {row[0]: row for row in report.grids()[0].rows}
    assert rows["riverrun auto"][-3:-1] == (f"{flops / 1e6:.2f} (25.0%)", f"{flops / 2e6:.2f} (12.5%)")
    assert rows["torch SDPA"][-3:-1] == rows["HBM floor"][-3:-1] == ("–", "–")
    assert len({len(row) for row in (*rows.values(), report.grids()[0].columns)}) == 1
    assert any(f"the share of the device's {4 * flops / 1e6:.0f}" in line for line in report.notes())
    others = replace(report, benchmark=BENCHMARKS["gated_delta"], case=case_of("n=1"))
    assert others.speeds("fresh") == {} and not any("TFLOP/s" in column for column in others.grids()[0].columns)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gates_are_those_that_models_start_with(variant):
    case = case_of(variant, T=2000)
    inputs = inputs_of(case)
    assert torch.allclose(inputs["k"].norm(dim=-1), torch.ones(()), atol=1e-5)
    assert inputs["v"].std().item() == pytest.approx(1, abs=0.05)
    keep, eta, theta = inputs["log_keep"].exp(), inputs["log_momentum"].exp(), inputs["lr"]
    half_life = 256 if variant.startswith("linear") else 8192
    assert keep.log2().median().item() == pytest.approx(-1 / half_life, rel=0.3)
    assert eta.median().item() == pytest.approx(0.9, abs=0.01)
    weights = [x for name, x in inputs.items() if name.startswith("weight_")]
    assert len(weights) == {"l": 1, "t": 2, "c": 3}[variant[0]]
    share = theta * FORMS[variant].rule.chunk_size * len(weights) / (2 * (1 - eta))  # κ: one a layer
    assert share.median().item() == pytest.approx(0.5, abs=0.02) and share.min() > 0 and share.max() < 1
    assert ours("chunked")(inputs, case).forward().isfinite().all()


@pytest.mark.parametrize("variant", ["two layers", "chunk 2048"])
def test_flas_delta_rule_gets_the_memorys_tokens_and_gates(variant, monkeypatch):
    case, got = case_of(variant), []

    def rule(q, k, v, g, beta, use_qk_l2norm_in_kernel):
        got.append((q, k, v, g, beta))
        return (q + k * v * (g + beta)[..., None],)

    packages = {
        "fla.ops.common.chunk_o": SimpleNamespace(),
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=rule),
    }
    inputs = inputs_of(case)
    (peer,) = (c for c in BENCHMARK.contenders(case) if c.name == "fla")
    assert peer.needs_cuda and not peer.same_maths
    work = peer.build(inputs, case, packages.__getitem__)
    assert all(g.any() for g in torch.autograd.grad(work.layer().sum(), work.layer_leaves))
    for x, name in zip(got[0], ("q", "k", "v", "log_keep", "lr"), strict=True):
        assert torch.equal(x, inputs[name])


@pytest.mark.parametrize("variant", ["linear", "linear b=64", "two layers b=16"])
def test_titans_pytorch_has_the_memory_of_the_variant(variant):
    case = case_of(variant, T=64)
    (peer,) = (c for c in BENCHMARK.contenders(case) if c.name == "titans-pytorch")
    assert (
        not peer.same_maths and peer.min_len == (16 if "16" in variant else 64) and peer.max_len == 512 * peer.min_len
    )
    inputs = inputs_of(case)
    work = peer.build(inputs, case, import_module)
    out = work.forward()
    assert out.shape == (case.B, case.T, case.D) and out.isfinite().all()
    grads = torch.autograd.grad(out.sum(), work.leaves)
    shapes = [tuple(leaf.shape) for leaf in work.leaves]
    for name, weight in inputs.items():
        assert not name.startswith("weight_") or tuple(weight.shape) in shapes
    assert grads[0].any()


def test_attention_has_heads_that_its_kernels_know():
    case = Case(1, 4, 2048, 4, torch.float32, torch.device("cpu"), "chunk 2048")
    sdpa = BENCHMARK.contenders(case)[-1]
    assert sdpa.build({}, case, nothing).forward().shape == (1, 16, 4, 128) and "16 heads" in sdpa.note
    narrow = replace(case, H=32, variant="linear")
    assert BENCHMARK.contenders(narrow)[-1].build({}, narrow, nothing).forward().shape == (1, 32, 4, 64)
