"""`riverrun bench` on tiny shapes: what it measures, writes and leaves out; every contender computes the op."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from riverrun.kernels.benchmarks import BENCHMARKS, run
from riverrun.kernels.benchmarks.benchmark import Contender, Unavailable, Work
from riverrun.modeling.memory_options import MEMORY_OPTIONS
from tests.launch.benches import (
    ALL,
    LINEAR,
    LOSS,
    MEMORY,
    MEMORY_BOUND,
    RNNS,
    ROOT,
    TINY,
    WHOLE,
    case_of,
    compare,
    errors,
    invoke,
    nothing,
)


def test_writes_a_table_a_plot_and_every_number(tmp_path):
    from matplotlib import image

    before = dict(os.environ)
    result = invoke("para_gru", *TINY, "--sweep-max", "64", "--only", "riverrun,torch loop,cuDNN", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert dict(os.environ) == before
    document = json.loads((tmp_path / "para_gru.json").read_text())
    assert document["cold_caches"] is True and "compilation included" in result.stdout
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["device"].startswith("CPU")
    assert list(document["regimes"]) == ["fresh", "retentive"]
    for regime in document["regimes"].values():
        found = {c["name"]: c for c in regime["contenders"]}
        assert list(found) == [
            "riverrun auto", "riverrun sequential", "riverrun 2 chunks", "riverrun 8 chunks", "riverrun 32 chunks",
            "riverrun chunked torch", "torch loop", "cuDNN GRU",
        ]  # fmt: skip
        for name in ("riverrun auto", "riverrun 2 chunks", "torch loop"):
            for what in ("forward", "backward", "layer"):
                time = found[name][what]
                assert time["median"] >= time["min"] > 0 and time["repeats"] == 2
            assert found[name]["first_call"] > 0 and found[name]["error_len"] == 32
            assert all(0 < e < 1e-5 for e in found[name]["error"].values())
        assert found["riverrun 2 chunks"]["solver"]["passes"] == 2
        assert found["riverrun 8 chunks"]["skipped"] == "left out below T=128"
        assert found["cuDNN GRU"]["skipped"] == "needs CUDA"
        # 4 numbers of 4 bytes an element forward, 7 backward
        milliseconds = 32 * 16 * 4 / document["copy_bandwidth"] * 1e3
        assert regime["hbm_floor_ms"] == pytest.approx({"forward": 4 * milliseconds, "backward": 7 * milliseconds})
    shapes = [(point["case"]["T"], point["case"]["B"]) for point in document["sweeps"]["length"]]
    assert shapes == [(16, 2), (32, 1), (64, 1)]
    assert all(point["contenders"][0]["backward"]["median"] > 0 for point in document["sweeps"]["length"])

    markdown = (tmp_path / "para_gru.md").read_text()
    for text in ("| riverrun auto ", "| HBM floor ", "cuDNN GRU: needs CUDA", "over T", "(para_gru.png)"):
        assert text in markdown
    for text in ("Time, retentive", "riverrun 2 chunks", "cuDNN GRU: needs CUDA", "times on a CPU", "para_gru.png"):
        assert text in result.stdout
    row = next(line for line in markdown.splitlines() if line.startswith("| torch loop ")).split("|")
    times = {c["name"]: c["forward"] for c in document["regimes"]["fresh"]["contenders"]}
    assert row[3].strip() == f"{times['torch loop']['median'] / times['riverrun auto']['median']:.2f}"
    assert image.imread(tmp_path / "para_gru.png").shape[1] > 1000


def test_sweeps_over_lengths_and_heads(tmp_path):
    from matplotlib import image

    options = ["--sweep-max", "32", "--only", "riverrun auto", "--keep-caches", "--out", tmp_path]
    result = invoke("gated_delta", *TINY, *options)
    assert result.exit_code == 0, result.output
    sweeps = json.loads((tmp_path / "gated_delta.json").read_text())["sweeps"]
    assert [p["case"]["T"] for p in sweeps["length"]] == [16, 32]
    assert [(p["case"]["H"], p["case"]["T"]) for p in sweeps["heads"]] == [(8, 32), (16, 32)]  # of 16 channels
    assert all(p["contenders"][0]["backward"]["median"] > 0 for axis in sweeps for p in sweeps[axis])
    assert "Median forward ms over T" in result.stdout and "Median backward ms over H" in result.stdout
    height, width = image.imread(tmp_path / "gated_delta.png").shape[:2]
    assert height > width / 2  # two rows of panels
    result = invoke("gated_delta", *TINY, *options, "--sweep", "heads")
    assert result.exit_code == 0 and "over T" not in result.stdout and "over H" in result.stdout


def test_every_mixer_beside_attention(tmp_path):
    shape = [
        "--batch",
        "1",
        "--seq-len",
        "96",
        "--width",
        "128",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--repeats",
        "2",
    ]
    result = invoke("mixers", *shape, "--sweep-min", "128", "--sweep-max", "128", "--keep-caches", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "mixers.json").read_text())
    measured = document["regimes"]["fresh"]["contenders"]
    assert [c["name"].split(",")[0] for c in measured] == [
        "attention", "attention", "mamba2", "gated_delta", "gated_delta", "para_gru", "para_lstm", "lstm", "slstm",
        *MEMORY_OPTIONS,
    ]  # fmt: skip
    assert not [c["skipped"] for c in measured if c["skipped"]]
    assert all(c["layer"]["median"] > 0 for c in measured)
    (point,) = document["sweeps"]["length"]
    assert (point["case"]["B"], point["case"]["T"]) == (1, 128)
    assert all(c["backward"]["median"] > 0 for c in point["contenders"])


def test_head_rnn_of_one_cell_without_a_sweep(tmp_path):
    options = ["--variant", "gru", "--sweep", "none", "--only", "riverrun", "--keep-caches"]
    result = invoke("head_rnn", *TINY, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "with what compilers had cached before" in result.stdout and "compilation included" not in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head_rnn.json", "head_rnn.md"]
    document = json.loads((tmp_path / "head_rnn.json").read_text())
    assert document["regimes"]["fresh"]["case"]["variant"] == "gru"
    assert all(c["layer"]["median"] > 0 for c in document["regimes"]["fresh"]["contenders"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["para_gruu"],
            "there is no benchmark of 'para_gruu'; choose one of para_gru, para_lstm, head_rnn, ",
        ),
        (
            ["mamba2"],
            "there is no benchmark of 'mamba2'; choose one of para_gru, para_lstm, head_rnn, gated_delta, ssd, "
            "neural_memory, diagonal_scan, causal_conv1d, gated_rms_norm, linear_cross_entropy, mamba2_layer, "
            "gated_delta_layer, titans_lmm_layer, prefix_linear_attention, mixers\n",
        ),
        (["gated_delta_layer", "--variant", "n=3"], "gated_delta_layer has no variant 'n=3'; choose one of n=1, n=2\n"),
        (["mamba2_layer", "--variant", "n=1"], "mamba2_layer has no variant 'n=1'; leave --variant out"),
        (["mamba2_layer", *TINY, "--only", "ssd"], "no contender is called 'ssd'; choose among riverrun auto, "),
        (["mixers", "--sweep-min", "64", "--sweep-max", "32"], "--sweep-min 64 is more than --sweep-max 32"),
        (["para_gru", "--width", "10", "--heads", "4"], "--width 10 is not divisible by --heads 4"),
        (["para_gru", "--variant", "lstm"], "para_gru has no variant 'lstm'; leave --variant out"),
        (
            ["neural_memory", "--variant", "deep"],
            "neural_memory has no variant 'deep'; choose one of linear, linear b=64, two layers, two layers b=16, "
            "chunk 2048\n",
        ),
        (["neural_memory", "--width", "10", "--heads", "4"], "--width 10 is not divisible by --heads 4"),
        (
            ["neural_memory", *TINY, "--only", "titans-torch"],
            "no contender is called 'titans-torch'; choose among riverrun auto, riverrun all states, "
            "riverrun chunked torch, fla, titans-pytorch, torch SDPA\n",
        ),
        (["head_rnn", "--variant", "gruu"], "head_rnn has no variant 'gruu'; choose one of lstm, slstm, gru, elman"),
        (["para_gru", *TINY, "--only", "cudnn"], "no contender is called 'cudnn'; choose among riverrun auto, "),
        (["para_gru", "--device", "cuda:99"], "device cuda:99 was asked for, but torch sees "),
    ],
)
def test_user_errors_are_one_line(args, message, tmp_path):
    result = invoke(*args, "--out", tmp_path)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_help_names_the_ops_and_imports_nothing_heavy():
    code = """
import sys
sys.argv = ["riverrun", "bench", "--help"]
from riverrun.launch.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "triton", "transformers", "numpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    env = os.environ | {"COLUMNS": "200", "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(op in done.stdout for op in ALL)
    assert all(
        v in done.stdout
        for op in ("head_rnn", "gated_delta", "gated_delta_layer", "ssd", "neural_memory", *dict(MEMORY_BOUND))
        for v in ALL[op].variants
    )
    assert all(f"`{op}`" in (ROOT / "docs" / "benchmark-protocol.md").read_text() for op in ALL)


@pytest.mark.parametrize(("op", "cell"), RNNS + LINEAR + MEMORY + MEMORY_BOUND + LOSS + WHOLE)
def test_every_form_of_ours_computes_the_op(op, cell):
    case = case_of(cell)
    for contender in ALL[op].contenders(case):
        if contender.same_maths and contender.name.startswith(("riverrun", "torch loop", "torch conv1d", "torch, all")):
            assert max(errors(op, case, contender.build).values()) < (1e-5 if op in BENCHMARKS else 1e-4), (
                contender.name
            )


@pytest.mark.parametrize(("op", "cell"), RNNS)
def test_the_compiled_loop_computes_the_op(op, cell, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)  # the compiler itself takes a while
    case = case_of(cell)
    (loop,) = (c for c in BENCHMARKS[op].contenders(case) if c.name == "compiled torch loop")
    assert max(errors(op, case, loop.build).values()) < 1e-5


@pytest.mark.parametrize(("op", "cell"), RNNS)
def test_the_layer_is_the_kernel_after_its_projection(op, cell):
    case = case_of(cell)
    inputs = run.make_inputs(BENCHMARKS[op], case, list(BENCHMARKS[op].regimes)[-1])
    work = BENCHMARKS[op].contenders(case)[0].build(inputs, case, nothing)
    torch.testing.assert_close(work.layer(), work.forward(), rtol=0, atol=1e-5)
    assert len(work.layer_leaves) == len(inputs) - 1  # all but the gates


@pytest.mark.parametrize(("op", "gate"), [("para_gru", -1), ("para_lstm", 1)])
def test_retentive_inputs_remember(op, gate):
    gates = run.make_inputs(BENCHMARKS[op], case_of(T=200), "retentive")["gates"]
    assert gates[:, :, 0].mean().item() == pytest.approx(4.0 * gate, abs=0.2)
    assert gates[:, :, 1:].mean().abs() < 0.2 and gates.std(dim=1).mean().item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(("op", "variant"), MEMORY_BOUND)
def test_memory_bound_ops(op, variant, tmp_path):
    shape = ["--batch", "2", "--seq-len", "32", "--width", "16", "--heads", "2", "--sweep-max", "32"]
    options = ["--device", "cpu", "--repeats", "2", "--keep-caches", "--out", tmp_path]
    result = invoke(op, *shape, *options, "--variant", variant)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / f"{op}.json").read_text())
    assert list(document["regimes"]) == ["fresh"] and list(document["sweeps"]) == ["length"]
    for c in document["regimes"]["fresh"]["contenders"]:
        if c["name"].startswith(("riverrun", "torch")):
            assert all(c[what]["median"] > 0 for what in ("forward", "backward", "layer")), c["name"]
            assert c["error_len"] == 32 and all(0 < e < 2e-2 for e in c["error"].values()), c["name"]  # bfloat16
        else:
            assert c["skipped"] == "needs CUDA", c["name"]
    for point in document["sweeps"]["length"]:
        assert point["contenders"][0]["backward"]["median"] > 0, point["contenders"][0]["skipped"]
    size = {"real": 2, "complex": 8}.get(variant, 2)  # bytes of a number
    numbers = {"diagonal_scan": (3, 5), "causal_conv1d": (2, 3), "gated_rms_norm": (3, 5)}[op]
    floor = document["regimes"]["fresh"]["hbm_floor_ms"]
    milliseconds = 2 * 32 * 16 * size / document["copy_bandwidth"] * 1e3
    assert floor == pytest.approx({"forward": numbers[0] * milliseconds, "backward": numbers[1] * milliseconds})


def test_documents_are_of_mixed_length_and_the_same_in_every_run():
    benchmark, case = BENCHMARKS["causal_conv1d"], case_of("documents", T=400)
    inputs = run.make_inputs(benchmark, case, "fresh")
    rows = run.make_inputs(benchmark, replace(case, variant="rows"), "fresh")
    assert torch.equal(inputs["x"], rows["x"].view(1, 800, 16))
    bounds = inputs["cu_seqlens"]
    assert torch.equal(bounds, run.make_inputs(benchmark, case, "fresh")["cu_seqlens"])
    lengths = bounds.diff()
    assert bounds[0] == 0 and bounds[-1] == 800 and lengths.min() == 1
    assert 400 / 8 * 0.8 < lengths.float().mean() < 400 / 8 * 1.2
    assert 2 <= (lengths == 1).sum() < len(lengths) / 2 and lengths.max() > 400 / 8


def test_documents_end_where_the_reference_does(monkeypatch):
    monkeypatch.setitem(run.REFERENCE_LENGTH, "cpu", 24)
    found = compare(BENCHMARKS["causal_conv1d"], case_of("documents"), only=("riverrun",))
    for name in ("riverrun auto", "riverrun chunked torch"):
        assert found[name].error_len == 24 and 0 < max(found[name].error.values()) < 1e-5, found[name].skipped


def test_errors_are_measured_on_the_first_tokens_of_long_sequences(monkeypatch):
    monkeypatch.setitem(run.REFERENCE_LENGTH, "cpu", 24)
    found = compare(BENCHMARKS["para_gru"], case_of(), only=("riverrun",))
    assert found["riverrun 2 chunks"].error_len == 24
    assert 0 < max(found["riverrun 2 chunks"].error.values()) < 1e-5


def test_errors_are_measured_on_as_many_tokens_as_there_is_memory_for():
    benchmark, tried = BENCHMARKS["para_gru"], []

    def reference(inputs, case):
        tried.append(case.T)
        if case.T > 16:
            raise torch.OutOfMemoryError("not enough")
        return benchmark.reference(inputs, case)

    found = compare(replace(benchmark, reference=reference), case_of(), only=("riverrun auto",))["riverrun auto"]
    assert tried[-2:] == [2 * found.error_len, found.error_len] and found.error_len <= 16 < tried[-2]
    assert 0 < found.error["output"] < 1e-5


def fake(*extra, ours="riverrun auto"):
    """para_gru with other contenders."""
    benchmark = BENCHMARKS["para_gru"]
    good = benchmark.contenders(case_of())[0]
    return replace(benchmark, contenders=lambda case: [*extra, replace(good, name=ours)])


def test_a_wrong_result_shows():
    def wrong(inputs, case, load):
        work = BENCHMARKS["para_gru"].reference(inputs, case)
        return replace(work, forward=lambda: 1.01 * BENCHMARKS["para_gru"].reference(inputs, case).forward())

    error = compare(fake(Contender("wrong", wrong)), case_of())["wrong"].error
    assert all(e == pytest.approx(0.01, rel=1e-2) for e in error.values())


def test_what_fails_is_listed_and_the_rest_goes_on():
    def broken(inputs, case, load):
        return Work(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3), ())

    def elsewhere(inputs, case, load):
        raise Unavailable("not on this card")

    found = compare(
        fake(
            Contender("broken", broken),
            Contender("missing", lambda inputs, case, load: load("fla.ops.hgrn")),
            Contender("elsewhere", elsewhere),
            Contender("long", broken, max_len=8),
            Contender("gpu", broken, needs_cuda=True),
        ),
        case_of(),
    )
    assert found["broken"].skipped.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert "\n" not in found["broken"].skipped
    assert found["missing"].skipped == "not installed: fla.ops.hgrn"
    assert found["elsewhere"].skipped == "not on this card"
    assert found["long"].skipped == "left out beyond T=8, which would take too long"
    assert found["gpu"].skipped == "needs CUDA"
    assert found["riverrun auto"].skipped is None and found["riverrun auto"].layer.median > 0


def sweep(benchmark):
    return list(run.sweep(benchmark, run.lengths(case_of(), 16, 64), nothing, repeats=2))


def test_the_sweep_leaves_out_what_does_not_fit(monkeypatch):
    need = run.estimated_bytes(BENCHMARKS["para_gru"], replace(case_of(), T=64, B=1))
    assert need == 64 * 16 * ((4 + 1 + 14) * 4 + 4)
    monkeypatch.setattr(run, "free_memory", lambda device: need if monkeypatch is None else need - 1)
    reasons = [results[0].skipped for _, results in sweep(fake())]
    assert reasons[0] is not None and "GiB needed" in reasons[0]  # 2 · 40 tokens are 5 rows of 16: more than 64 tokens


def test_the_sweep_leaves_out_who_was_too_slow(monkeypatch):
    monkeypatch.setattr(run, "SLOWEST_CALL", 0.0)
    results = [found[0] for _, found in sweep(fake())]
    assert results[0].skipped is None and results[0].forward.median > 0
    assert [r.skipped for r in results[1:]] == ["left out: over 0 ms a call at T=16, 2 heads"] * 2
    assert all(r.forward is None for r in results[1:])
