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
from riverrun.launch import cli

ROOT = Path(__file__).parents[2]
TINY = ["--batch", "1", "--seq-len", "32", "--width", "16", "--heads", "2", "--device", "cpu", "--dtype", "fp32",
        "--repeats", "2"]  # fmt: skip
RNNS = [("para_gru", ""), ("para_lstm", ""), *(("head_rnn", cell) for cell in BENCHMARKS["head_rnn"].variants)]
LOSS = [("linear_cross_entropy", "32768")]
LINEAR = [("ssd", ""), *(("gated_delta", steps) for steps in BENCHMARKS["gated_delta"].variants)]


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
    benchmark = BENCHMARKS[op]
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
    shapes = [(point["case"]["T"], point["case"]["B"]) for point in document["sweep"]]
    assert shapes == [(16, 2), (32, 1), (64, 1)]
    assert all(point["contenders"][0]["backward"]["median"] > 0 for point in document["sweep"])

    markdown = (tmp_path / "para_gru.md").read_text()
    for text in ("| riverrun auto ", "| HBM floor ", "cuDNN GRU: needs CUDA", "over T", "(para_gru.png)"):
        assert text in markdown
    for text in ("Time, retentive", "riverrun 2 chunks", "cuDNN GRU: needs CUDA", "times on a CPU", "para_gru.png"):
        assert text in result.stdout
    row = next(line for line in markdown.splitlines() if line.startswith("| torch loop ")).split("|")
    times = {c["name"]: c["forward"] for c in document["regimes"]["fresh"]["contenders"]}
    assert row[3].strip() == f"{times['torch loop']['median'] / times['riverrun auto']['median']:.2f}"
    assert image.imread(tmp_path / "para_gru.png").shape[1] > 1000


def test_head_rnn_of_one_cell_without_a_sweep(tmp_path):
    options = ["--variant", "gru", "--no-sweep", "--only", "riverrun", "--keep-caches"]
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
    assert all(op in done.stdout for op in BENCHMARKS)
    assert all(v in done.stdout for op in ("head_rnn", "gated_delta") for v in BENCHMARKS[op].variants)


@pytest.mark.parametrize(("op", "cell"), RNNS + LINEAR + LOSS)
def test_every_form_of_ours_computes_the_op(op, cell):
    case = case_of(cell)
    for contender in BENCHMARKS[op].contenders(case):
        if contender.name.startswith(("riverrun", "torch loop", "torch, all")):
            assert max(errors(op, case, contender.build).values()) < 1e-5, contender.name


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


def test_errors_are_measured_on_the_first_tokens_of_long_sequences(monkeypatch):
    monkeypatch.setitem(run.REFERENCE_LENGTH, "cpu", 24)
    found = compare(BENCHMARKS["para_gru"], case_of(), only=("riverrun",))
    assert found["riverrun 2 chunks"].error_len == 24
    assert 0 < max(found["riverrun 2 chunks"].error.values()) < 1e-5


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
    return list(run.sweep(benchmark, case_of(), [16, 32, 64], nothing, repeats=2))


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
    assert [r.skipped for r in results[1:]] == ["left out: over 0 ms a call at T=16"] * 2
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
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=rule),
        "fla.ops.gated_delta_product": SimpleNamespace(chunk_gated_delta_product=rule),
        "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=scan),
        "liger_kernel.ops.fused_linear_cross_entropy": SimpleNamespace(LigerFusedLinearCrossEntropyFunction=Loss),
    }
    case = case_of(variant)
    (peer,) = (c for c in BENCHMARKS[op].contenders(case) if c.name in ("fla", "mamba_ssm", "Liger"))
    assert max(errors(op, case, lambda i, c, _: peer.build(i, c, packages.__getitem__)).values()) < 1e-5


def test_cudnn_contenders_have_all_gradients():
    case = case_of()
    inputs = run.make_inputs(BENCHMARKS["para_gru"], case, "fresh")
    for cell in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        work = contenders.cudnn(cell).build(inputs, case, nothing)
        h = work.forward()
        assert h.shape == (2, 40, 16)
        assert len(torch.autograd.grad(h.sum(), work.leaves)) == 5
