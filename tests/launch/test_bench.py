"""`riverrun bench` on tiny shapes: what it measures, writes and leaves out; every contender computes the op."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from riverrun.kernels.benchmarks import BENCHMARKS, contenders, run
from riverrun.kernels.benchmarks.benchmark import Case, Contender, Unavailable, Work
from riverrun.kernels.benchmarks.timing import Time
from riverrun.launch import cli
from riverrun.launch.bench_report import Report
from riverrun.modeling.benchmarks import LAYERS

ROOT = Path(__file__).parents[2]
TINY = ["--batch", "1", "--seq-len", "32", "--width", "16", "--heads", "2", "--device", "cpu", "--dtype", "fp32",
        "--repeats", "2"]  # fmt: skip
RNNS = [("para_gru", ""), ("para_lstm", ""), *(("head_rnn", cell) for cell in BENCHMARKS["head_rnn"].variants)]
LOSS = [("linear_cross_entropy", "32768")]
MEMORY_BOUND = [(op, v) for op in ("diagonal_scan", "causal_conv1d", "gated_rms_norm") for v in BENCHMARKS[op].variants]
LINEAR = [(op, variant) for op in ("ssd", "gated_delta") for variant in BENCHMARKS[op].variants]
WHOLE = [("mamba2_layer", ""), *(("gated_delta_layer", steps) for steps in LAYERS["gated_delta_layer"].variants)]
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
        "32",
        "--width",
        "128",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--repeats",
        "2",
    ]
    result = invoke("mixers", *shape, "--sweep-min", "64", "--sweep-max", "64", "--keep-caches", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "mixers.json").read_text())
    measured = document["regimes"]["fresh"]["contenders"]
    assert [c["name"].split(",")[0] for c in measured] == [
        "attention", "attention", "mamba2", "gated_delta", "gated_delta", "para_gru", "para_lstm", "lstm", "slstm",
    ]  # fmt: skip
    assert all(c["layer"]["median"] > 0 and not c["skipped"] for c in measured)
    (point,) = document["sweeps"]["length"]
    assert (point["case"]["B"], point["case"]["T"]) == (1, 64)
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
            "diagonal_scan, causal_conv1d, gated_rms_norm, linear_cross_entropy, mamba2_layer, gated_delta_layer, "
            "prefix_linear_attention, mixers\n",
        ),
        (["gated_delta_layer", "--variant", "n=3"], "gated_delta_layer has no variant 'n=3'; choose one of n=1, n=2\n"),
        (["mamba2_layer", "--variant", "n=1"], "mamba2_layer has no variant 'n=1'; leave --variant out"),
        (["mamba2_layer", *TINY, "--only", "ssd"], "no contender is called 'ssd'; choose among riverrun auto, "),
        (["mixers", "--sweep-min", "64", "--sweep-max", "32"], "--sweep-min 64 is more than --sweep-max 32"),
        (["para_gru", "--width", "10", "--heads", "4"], "--width 10 is not divisible by --heads 4"),
        (["para_gru", "--variant", "lstm"], "para_gru has no variant 'lstm'; leave --variant out"),
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
        for op in ("head_rnn", "gated_delta", "gated_delta_layer", "ssd", *dict(MEMORY_BOUND))
        for v in ALL[op].variants
    )
    assert all(f"`{op}`" in (ROOT / "docs" / "benchmark-protocol.md").read_text() for op in ALL)


@pytest.mark.parametrize(("op", "cell"), RNNS + LINEAR + MEMORY_BOUND + LOSS + WHOLE)
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


def hgrn(x, decay):
    h, out = torch.zeros_like(x[:, 0]), []
    for x_t, g_t in zip(x.unbind(1), decay.unbind(1)):
        h = g_t.exp() * h + x_t
        out.append(h)
    return torch.stack(out, 1), None


def selective_scan(u, delta, A, B, C):
    """u, delta (B, D, T), A (D, N), B, C (B, N, T) → (B, D, T)."""
    h, out = torch.zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = (delta[..., t, None] * A).exp() * h + (delta * u)[..., t, None] * B[:, None, :, t]
        out.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(out, -1)


@pytest.mark.parametrize("op", ["para_gru", "head_rnn"])
def test_linear_scans_are_called_as_their_packages_want(op):
    """Stand-ins of the documented signatures; the packages need a GPU."""
    packages = {
        "fla.ops.hgrn": SimpleNamespace(fused_recurrent_hgrn=hgrn, chunk_hgrn=hgrn),
        "mamba_ssm.ops.selective_scan_interface": SimpleNamespace(selective_scan_fn=selective_scan),
    }
    case = case_of("lstm" if op == "head_rnn" else "")
    inputs = run.make_inputs(BENCHMARKS[op], case, "fresh")
    for contender in contenders.linear_scans():
        work = contender.build(inputs, case, packages.__getitem__)
        h = work.forward()
        assert h.numel() == case.elements and h.isfinite().all()
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(h.sum(), work.leaves))


@pytest.mark.parametrize("cell", ["lstm", "slstm", "gru", "elman"])
def test_flashrnn_gets_its_layout(cell):
    """A stand-in with FlashRNN's conventions: R (G, H, out, in), and in its GRU a recurrent gate and a bias for n
    that stand first."""
    from riverrun.kernels.benchmarks.head_rnn import flashrnn
    from riverrun.kernels.head_rnn.cells import CELLS

    def stand_in(Wx, R, b, function, backend, dtype):
        assert dtype == "float32" and b.shape == (len(R) + (function == "gru"), *R.shape[1:3])
        state, out = [Wx.new_zeros(Wx.shape[0], *R.shape[1:3]) for _ in CELLS[function].states], []
        for token in Wx.unbind(1):
            rec = [torch.einsum("hij,bhj->bhi", r, state[-1]) for r in R]
            rec = [rec[1], rec[2], rec[0]] if function == "gru" else rec
            state = CELLS[function].step(tuple(state), token.unbind(1), tuple(rec))
            out.append(state[-1])
        return torch.stack(out, 1)[None], None

    packages = {"flashrnn": SimpleNamespace(flashrnn=stand_in)}
    build = flashrnn("cuda")
    assert max(errors("head_rnn", case_of(cell), lambda i, c, _: build(i, c, packages.__getitem__)).values()) < 1e-5


@pytest.mark.parametrize(("op", "variant"), LINEAR + LOSS)
def test_peers_get_their_layout(op, variant):
    """Stand-ins with the packages' signatures: k, v and beta of n steps one after another; D by name; a sum, with z."""
    from riverrun.kernels.gated_delta import gated_delta
    from riverrun.kernels.linear_cross_entropy import linear_cross_entropy
    from riverrun.kernels.ssd import ssd

    def rule(q, k, v, g, beta, num_householder=1, use_qk_l2norm_in_kernel=False):
        k, v, beta = (x.unflatten(1, (-1, num_householder)) for x in (k, v, beta))
        return gated_delta(q, k, v, beta, g, qk_l2norm=use_qk_l2norm_in_kernel)

    def scan(x, dt, A, B, C, chunk_size, D=None):
        return ssd(x, dt, A, B, C, D)[0]

    class Loss:
        @staticmethod
        def apply(hidden, weight, targets, bias, class_weight, ignore_index, z_loss, smoothing, reduction):
            assert reduction == "sum"
            out = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, ignore_index=ignore_index)
            return out.loss + out.z_loss, None

    packages = {
        "fla.ops.common.chunk_o": SimpleNamespace(),
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=rule),
        "fla.ops.gated_delta_product": SimpleNamespace(chunk_gated_delta_product=rule),
        "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=scan),
        "liger_kernel.ops.fused_linear_cross_entropy": SimpleNamespace(LigerFusedLinearCrossEntropyFunction=Loss),
    }
    case = case_of(variant)
    (peer,) = (c for c in BENCHMARKS[op].contenders(case) if c.name in ("fla", "mamba_ssm", "Liger"))
    assert max(errors(op, case, lambda i, c, _: peer.build(i, c, packages.__getitem__)).values()) < 1e-5


@pytest.mark.parametrize(("op", "variant"), [found for found in MEMORY_BOUND if found[1] != "complex"])
def test_peers_of_memory_bound_ops_get_their_layout(op, variant):
    """Stand-ins with the packages' signatures: channels before time, but neighbours; log a; the norm by name."""
    from riverrun.kernels.causal_conv1d import causal_conv1d
    from riverrun.kernels.gated_rms_norm import gated_rms_norm

    def tri_dao(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                final_states_out=None, activation=None):  # fmt: skip
        assert x.stride(1) == 1 and (seq_idx is None) == (variant == "rows")
        if seq_idx is None:
            return causal_conv1d(x.mT, weight, bias, activation=activation)[0].mT
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == (1, x.shape[2]) and seq_idx.is_contiguous()
        documents = x.mT.split(seq_idx[0].unique_consecutive(return_counts=True)[1].tolist(), dim=1)
        return torch.cat([causal_conv1d(d, weight, bias, activation=activation)[0] for d in documents], dim=1).mT

    def fla_conv(x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False,
                 activation=None, backend="triton", cu_seqlens=None):  # fmt: skip
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        return causal_conv1d(x, weight, bias, activation=activation, cu_seqlens=cu_seqlens)[0], None

    def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        assert bias is None and group_size is None
        return gated_rms_norm(x, z, weight, eps=eps, norm_before_gate=norm_before_gate)

    def rms_norm_gated(x, g, weight, bias, activation="swish", residual=None, prenorm=False, residual_in_fp32=False,
                       eps=1e-6):  # fmt: skip
        assert bias is None and activation == "swish" and not prenorm
        return gated_rms_norm(x, g, weight, eps=eps, norm_before_gate=True)

    packages = {
        "causal_conv1d": SimpleNamespace(causal_conv1d_fn=tri_dao),
        "fla.modules.convolution": SimpleNamespace(causal_conv1d=fla_conv),
        "mamba_ssm.ops.triton.layernorm_gated": SimpleNamespace(rmsnorm_fn=rmsnorm_fn),
        "fla.modules.fused_norm_gate": SimpleNamespace(rms_norm_gated=rms_norm_gated),
        "fla.modules.layernorm_gated": SimpleNamespace(rmsnorm_fn=rmsnorm_fn),
        "fla.ops.hgrn": SimpleNamespace(fused_recurrent_hgrn=hgrn, chunk_hgrn=hgrn),
    }
    case = case_of(variant)
    peers = [c for c in BENCHMARKS[op].contenders(case) if c.needs_cuda]
    assert len(peers) == 2 and all(peer.same_maths for peer in peers)
    for build in (peer.build for peer in peers):
        assert max(errors(op, case, lambda i, c, _, build=build: build(i, c, packages.__getitem__)).values()) < 1e-5


def test_cudnn_contenders_have_all_gradients():
    case = case_of()
    inputs = run.make_inputs(BENCHMARKS["para_gru"], case, "fresh")
    for cell in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        work = contenders.cudnn(cell).build(inputs, case, nothing)
        h = work.forward()
        assert h.shape == (2, 40, 16)
        assert len(torch.autograd.grad(h.sum(), work.leaves)) == 5


# whole layers


@pytest.mark.parametrize(("op", "variant"), WHOLE)
def test_a_layer_is_run_with_the_share_of_its_recurrence_and_glue(op, variant, tmp_path):
    options = [
        "--batch",
        "1",
        "--seq-len",
        "16",
        "--width",
        "128",
        "--device",
        "cpu",
        "--repeats",
        "2",
        "--sweep",
        "none",
    ]
    variants = ["--variant", variant] if variant else []
    result = invoke(op, *options, *variants, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / f"{op}.json").read_text())["regimes"]["fresh"]
    assert document["case"]["H"] == {"mamba2_layer": 4, "gated_delta_layer": 1}[op]  # heads of 64 in 2 D, of 128 in D
    found = {c["name"]: c for c in document["contenders"]}
    for name in ("riverrun auto", "projections alone", "riverrun attention"):
        assert all(found[name][what]["median"] > 0 for what in ("forward", "backward", "layer")), name
        assert set(found[name]["error"]) == ({"output", "gradients"} if name == "riverrun auto" else set())
    assert found["riverrun auto"]["error"]["output"] < 2e-2
    assert found["fla"]["skipped"] == "needs CUDA"
    share = 1 - found["projections alone"]["layer"]["median"] / found["riverrun auto"]["layer"]["median"]
    assert document["recurrence_and_glue"] == {"riverrun auto": pytest.approx(share)}
    line = f"recurrence and glue: {share:.0%} of the layer's time, riverrun auto"
    assert line in result.stdout and line in (tmp_path / f"{op}.md").read_text()


def test_recurrence_and_glue_are_what_the_products_do_not_take():
    def result(name, ms):
        return run.Result(name, layer=Time(ms, ms, 1) if ms else None)

    case = Case(1, 16, 128, 4, torch.bfloat16, torch.device("cpu"))
    report = Report(LAYERS["mamba2_layer"], case, 1e12, 1, "", cold=True)
    ours, peer = result("riverrun auto", 20.0), result("mamba_ssm", 30.0)
    others = [result("fla", None), result("riverrun attention", 25.0)]
    report.results["fresh"] = [ours, result("projections alone", 15.0), peer, *others]
    assert report.shares("fresh") == {"riverrun auto": 0.25, "mamba_ssm": 0.5}
    first, second, third, *_ = report.notes()
    assert first.startswith(
        "recurrence and glue: 25% of the layer's time, riverrun auto: 1 − projections alone / layer"
    )
    assert second.startswith("recurrence and glue: 50% of the layer's time, mamba_ssm: ")
    assert third.startswith("fresh: ")
    report.results["fresh"] = [ours, peer]
    assert report.shares("fresh") == {} and report.notes()[0].startswith("fresh: ")
    kernel = replace(report, benchmark=BENCHMARKS["para_gru"])
    assert kernel.shares("fresh") == {}


@pytest.mark.parametrize(("op", "variant"), WHOLE)
def test_the_projections_alone_are_all_of_the_layers_products(op, variant):
    from torch.utils.flop_counter import FlopCounterMode

    case = case_of(variant)
    inputs = run.make_inputs(LAYERS[op], case, "fresh")
    (alone,) = (c for c in LAYERS[op].contenders(case) if c.name == "projections alone")
    work = alone.build(inputs, case, nothing)
    with FlopCounterMode(display=False) as counter:
        out = work.layer()
    weights = [w for name, w in inputs.items() if name.endswith("_proj.weight")]
    assert counter.get_total_flops() == 2 * case.B * case.T * sum(w.numel() for w in weights)
    assert sorted(w.data_ptr() for w in work.leaves[1:]) == sorted(w.data_ptr() for w in weights)

    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad(out, work.layer_leaves, torch.randn_like(out))
    # the gradients of inputs and of weights; the random numbers between need none
    assert counter.get_total_flops() == 2 * 2 * case.B * case.T * sum(w.numel() for w in weights)
    assert all(g.shape == w.shape and g.any() for g, w in zip(grads, work.layer_leaves, strict=True))


@pytest.mark.parametrize(("op", "variant"), WHOLE)
def test_contenders_of_a_layer_share_its_parameters(op, variant):
    case = case_of(variant)
    inputs = run.make_inputs(LAYERS[op], case, "fresh")
    leaves = LAYERS[op].contenders(case)[0].build(inputs, case, nothing).leaves
    assert [x.data_ptr() for x in leaves] == [x.data_ptr() for x in inputs.values()]
    narrow = run.make_inputs(LAYERS[op], replace(case, dtype=torch.bfloat16), "fresh")
    wide = {name for name, x in narrow.items() if x.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias"} | ({"D"} if op == "mamba2_layer" else set())


class TheirMamba2(torch.nn.Module):
    """A stand-in with the parameters of mamba_ssm's and fla's Mamba2: one projection to z, x, B, C, dt."""

    def __init__(self, D, N, W, expand, P, eps=1e-5):
        super().__init__()
        self.P, self.N, self.eps, inner = P, N, eps, expand * D
        H = inner // P
        self.sizes = [inner, inner + 2 * N, H]
        self.in_proj = torch.nn.Linear(D, sum(self.sizes), bias=False)
        self.conv1d = torch.nn.Conv1d(inner + 2 * N, inner + 2 * N, W, groups=inner + 2 * N, padding=W - 1)
        self.dt_bias, self.A_log, self.D = (torch.nn.Parameter(torch.zeros(H)) for _ in range(3))
        self.norm = torch.nn.Module()
        self.norm.weight = torch.nn.Parameter(torch.zeros(inner))
        self.out_proj = torch.nn.Linear(inner, D, bias=False)

    def forward(self, x):
        from riverrun.kernels.ssd import ssd

        z, xBC, dt = self.in_proj(x).split(self.sizes, -1)
        xBC = torch.nn.functional.silu(self.conv1d(xBC.mT)[..., : x.shape[1]].mT)
        x, B, C = xBC.split([self.sizes[0], self.N, self.N], -1)
        dt = torch.nn.functional.softplus(dt + self.dt_bias)
        y = ssd(x.unflatten(2, (-1, self.P)), dt, -self.A_log.exp(), B[:, :, None], C[:, :, None], self.D)[0].flatten(2)
        y = torch.nn.functional.rms_norm(y * torch.nn.functional.silu(z), z.shape[-1:], self.norm.weight, self.eps)
        return self.out_proj(y)


def mamba_ssm_layer(d_model, d_state, d_conv, expand, headdim, ngroups):
    assert ngroups == 1
    return TheirMamba2(d_model, d_state, d_conv, expand, headdim)


class FlaMamba2(TheirMamba2):
    def __init__(self, hidden_size, head_dim, state_size, expand, n_groups, conv_kernel, norm_eps):
        assert n_groups == 1
        super().__init__(hidden_size, state_size, conv_kernel, expand, head_dim, norm_eps)

    def forward(self, x):
        return super().forward(x), None, None


class FlaDelta(torch.nn.Module):
    """A stand-in for fla's GatedDeltaNet and GatedDeltaProduct."""

    def __init__(self, hidden_size, num_heads, head_dim, expand_v, conv_size, allow_neg_eigval, norm_eps,
                 num_householder=1):  # fmt: skip
        super().__init__()
        assert expand_v == 1.0 and allow_neg_eigval
        H, K, n, self.eps = num_heads, head_dim, num_householder, norm_eps
        self.H, self.K, self.n = H, K, n
        for name, size in (("q", H * K), ("k", n * H * K), ("v", n * H * K), ("b", n * H), ("a", H), ("g", H * K)):
            setattr(self, f"{name}_proj", torch.nn.Linear(hidden_size, size, bias=False))
            if name in "qkv":
                conv = torch.nn.Conv1d(size, size, conv_size, groups=size, padding=conv_size - 1, bias=False)
                setattr(self, f"{name}_conv1d", conv)
        self.A_log, self.dt_bias = (torch.nn.Parameter(torch.zeros(H)) for _ in range(2))
        self.o_norm = torch.nn.Module()
        self.o_norm.weight = torch.nn.Parameter(torch.zeros(K))
        self.o_proj = torch.nn.Linear(H * K, hidden_size, bias=False)

    def forward(self, x):
        from riverrun.kernels.gated_delta import gated_delta

        q, k, v = (
            torch.nn.functional.silu(conv(proj(x).mT)[..., : x.shape[1]].mT)
            for proj, conv in ((self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d), (self.v_proj, self.v_conv1d))
        )
        steps, heads = (self.n, self.H, self.K), (self.H, self.K)
        beta = 2 * self.b_proj(x).sigmoid().unflatten(2, steps[:2])
        g = -self.A_log.exp() * torch.nn.functional.softplus(self.a_proj(x) + self.dt_bias)
        o = gated_delta(
            q.unflatten(2, heads), k.unflatten(2, steps), v.unflatten(2, steps), beta, g, qk_l2norm=True
        )[0]  # fmt: skip
        o = torch.nn.functional.rms_norm(o, (self.K,), self.o_norm.weight, self.eps)
        o = o * torch.nn.functional.silu(self.g_proj(x).unflatten(2, heads))
        return self.o_proj(o.flatten(2)), None, None


LAYER_PACKAGES = {
    "mamba_ssm.modules.mamba2": SimpleNamespace(Mamba2=mamba_ssm_layer),
    "fla.layers.mamba2": SimpleNamespace(Mamba2=FlaMamba2, is_fast_path_available=True),
    "fla.layers.gated_deltanet": SimpleNamespace(GatedDeltaNet=FlaDelta),
    "fla.layers.gated_deltaproduct": SimpleNamespace(GatedDeltaProduct=FlaDelta),
}


@pytest.mark.parametrize(("op", "variant"), WHOLE)
def test_peers_get_the_layers_parameters(op, variant):
    """Stand-ins with the packages' signatures and parameters; every gradient is compared with that of ours."""
    case = case_of(variant)
    peers = [c for c in LAYERS[op].contenders(case) if c.name in ("fla", "mamba_ssm")]
    assert len(peers) == (2 if op == "mamba2_layer" else 1)
    for build in (peer.build for peer in peers):
        assert (
            max(errors(op, case, lambda i, c, _, build=build: build(i, c, LAYER_PACKAGES.__getitem__)).values()) < 1e-5
        )


def test_flas_mamba2_needs_mamba_ssm():
    case = case_of()
    inputs = run.make_inputs(LAYERS["mamba2_layer"], case, "fresh")
    (peer,) = (c for c in LAYERS["mamba2_layer"].contenders(case) if c.name == "fla")
    slow = SimpleNamespace(Mamba2=FlaMamba2, is_fast_path_available=False)
    with pytest.raises(Unavailable, match="mamba_ssm, which is not installed"):
        peer.build(inputs, case, lambda name: slow)
