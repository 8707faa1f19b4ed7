"""`riverrun bench` on a GPU: ours through Triton, cuDNN beside it, memory and errors measured."""

import json

import pytest
from typer.testing import CliRunner

from riverrun.kernels.benchmarks import BENCHMARKS
from riverrun.launch import cli


@pytest.mark.parametrize(
    ("op", "rival"), [("para_gru", "cuDNN GRU"), ("para_lstm", "cuDNN LSTM"), ("head_rnn", "cuDNN LSTM")]
)
def test_bench(op, rival, tmp_path):
    shape = ["--batch", "2", "--seq-len", "256", "--width", "128", "--heads", "2", "--sweep-max", "64"]
    options = [*shape, "--only", f"riverrun auto,{rival}", "--out", str(tmp_path), "--repeats", "5", "--keep-caches"]
    result = CliRunner().invoke(cli.app, ["bench", op, *options])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / f"{op}.json").read_text())
    assert document["copy_bandwidth"] > 1e11
    for regime in document["regimes"].values():
        ours, cudnn = regime["contenders"]
        assert ours["skipped"] is None and cudnn["skipped"] is None, (ours["skipped"], cudnn["skipped"])
        assert ours["backward_memory"] > ours["forward_memory"] > 0
        assert set(ours["error"]) == {"output", "gradients"}
        assert max(ours["error"].values()) < 2e-2
        assert ours["layer"]["median"] > 0 and cudnn["layer"]["median"] > 0 and not cudnn["error"]
    assert [point["case"]["T"] for point in document["sweeps"]["length"]] == [16, 32, 64]
    assert all(c["backward"]["median"] > 0 for point in document["sweeps"]["length"] for c in point["contenders"])


@pytest.mark.parametrize(
    ("op", "variant"),
    [(op, v) for op in ("diagonal_scan", "causal_conv1d", "gated_rms_norm") for v in BENCHMARKS[op].variants],
)
def test_bench_of_memory_bound_ops(op, variant, tmp_path):
    shape = ["--batch", "2", "--seq-len", "256", "--width", "256", "--sweep-max", "64"]
    options = [*shape, "--out", str(tmp_path), "--repeats", "5", "--keep-caches", "--variant", variant]
    result = CliRunner().invoke(cli.app, ["bench", op, *options])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / f"{op}.json").read_text())
    for c in document["regimes"]["fresh"]["contenders"]:
        if c["name"].startswith(("riverrun", "torch")):
            assert c["skipped"] is None and c["layer"]["median"] > 0 and c["layer_memory"] > 0, c
        if c["skipped"] is None:  # other packages, where they are installed, compute the same
            assert set(c["error"]) == {"output", "gradients"} and max(c["error"].values()) < 2e-2, c
    assert [point["case"]["T"] for point in document["sweeps"]["length"]] == [16, 32, 64]
    assert all(point["contenders"][0]["backward"]["median"] > 0 for point in document["sweeps"]["length"])


@pytest.mark.parametrize(
    ("op", "variant"),
    [("mamba2_layer", ""), ("gated_delta_layer", "n=1"), ("gated_delta_layer", "n=2"), ("titans_lmm_layer", "linear")],
)
def test_bench_of_a_layer(op, variant, tmp_path):
    shape = ["--batch", "2", "--seq-len", "512", "--width", "512", "--sweep-max", "64"]
    options = [*shape, "--out", str(tmp_path), "--repeats", "5", "--keep-caches"]
    result = CliRunner().invoke(cli.app, ["bench", op, *options, *(["--variant", variant] if variant else [])])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / f"{op}.json").read_text())
    found = {c["name"]: c for c in document["regimes"]["fresh"]["contenders"]}
    for name in ("riverrun auto", "projections alone", "riverrun attention"):
        assert found[name]["skipped"] is None, found[name]["skipped"]
        assert found[name]["layer"]["median"] > 0 and found[name]["layer_memory"] > 0
    for c in found.values():  # other packages, where they are installed, have our parameters
        if c["error"]:
            assert c["error"]["output"] < 2e-2 and c["error"]["gradients"] < 1e-1, c
    assert 0 < document["regimes"]["fresh"]["recurrence_and_glue"]["riverrun auto"] < 1
    assert all(c["backward"]["median"] > 0 for point in document["sweeps"]["length"] for c in point["contenders"][:2])
