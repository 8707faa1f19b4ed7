"""`riverrun doctor`: what it finds, what it says to do, and its exit code."""

import errno
from pathlib import Path

import pytest
from typer.testing import CliRunner

from riverrun.launch import cli, doctor
from riverrun.launch.all_reduce import all_reduce_sums
from riverrun.launch.doctor import Finding


def found(check, folder=Path(".")):
    findings = list(check(folder))
    assert all(bool(f.fix) == (f.state != "ok") for f in findings), (
        "every warning and problem has a fix, and only those"
    )
    return {f.name: f for f in findings}


def run(*args):
    return CliRunner().invoke(cli.app, ["doctor", *args], env={"TERM": "dumb", "COLUMNS": "200"})


def test_versions_are_compared_with_the_declared_ones(monkeypatch):
    findings = found(doctor.versions)
    assert {"python", "torch", "triton", "deepspeed", "transformers", "datasets"} <= findings.keys()
    assert not {"pytest", "wandb"} & findings.keys(), "extras are not required"

    real = doctor.metadata.version

    def version(name):
        if name == "datasets":
            raise doctor.metadata.PackageNotFoundError(name)
        return "4.0.0" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    findings = found(doctor.versions)
    assert findings["transformers"].state == "problem" and "4.0.0, but" in findings["transformers"].detail
    assert findings["transformers"].fix.startswith("pip install 'transformers")
    assert findings["datasets"] == Finding("datasets", "problem", "not installed", "pip install 'datasets>=4'")


@pytest.mark.parametrize(
    ("version", "capabilities", "state"),
    [
        ("3.3.1", [(9, 0)], "ok"),
        ("3.4.0", [(9, 0)], "warning"),
        ("3.7.0", [(8, 0), (9, 0)], "warning"),
        ("3.6.0+git1", [(9, 0)], "warning"),
        ("3.6.0", [], "warning"),  # a login node: the GPUs may be elsewhere
        ("3.6.0", [(8, 0)], "ok"),
        ("3.7.1", [(9, 0)], "ok"),
        ("3.9.0", [], "ok"),
    ],
)
def test_triton_that_miscompiles_on_hopper(version, capabilities, state):
    finding = doctor.hopper_finding(version, capabilities)
    assert finding.state == state and version in finding.detail
    if state == "warning":
        assert "gated delta" in finding.detail and "triton>=3.7.1" in finding.fix


@pytest.mark.parametrize(
    ("version", "capabilities", "state"),
    [
        ("12.8", [(8, 0), (9, 0)], "warning"),
        ("13.2", [], "warning"),
        ("12.9", [(10, 0)], "ok"),
        ("13.3", [(9, 0)], "ok"),
        ("13.10", [], "ok"),
    ],
)
def test_an_assembler_that_miscompiles_on_hopper(version, capabilities, state):
    finding = doctor.assembler_finding(version, capabilities)
    assert finding.state == state and version in finding.detail
    if state == "warning":
        assert "TRITON_PTXAS_PATH" in finding.fix


def test_a_broken_import_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('CUDA_HOME is not set')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [finding] = found(doctor.imports).values()
    assert finding.state == "problem" and "CUDA_HOME is not set" in finding.detail


@pytest.mark.parametrize("cuda", [False, True])
def test_no_compiler(monkeypatch, cuda):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    [finding] = found(doctor.compiler).values()
    assert finding.state == ("problem" if cuda else "warning") and "install gcc" in finding.fix


def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    [finding] = found(doctor.gpus).values()
    assert finding.state == "problem" and "torch cannot use it" in finding.detail
    tool.write_text("#!/bin/sh\nexit 9\n")  # the tool without a GPU
    assert found(doctor.gpus)["GPU"].state == "ok"


@pytest.mark.parametrize(("free", "state"), [(0.5e9, "problem"), (10e9, "warning"), (100e9, "ok")])
def test_disk_space(monkeypatch, tmp_path, free, state):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    findings = found(doctor.disk, tmp_path)
    assert findings["disk space"].state == state
    assert ("disk speed" in findings) == (state != "problem"), "a full disk is not filled further"
    assert list(tmp_path.iterdir()) == [], "the test file is removed"


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def refuse(**kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    finding = found(doctor.disk, tmp_path)["disk speed"]
    assert finding.state == "problem" and "Permission denied" in finding.detail


def test_matmul(monkeypatch):
    assert {f.state for f in found(doctor.matmul).values()} == {"ok"}
    import torch

    real = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: real(self) * 1.1)
    assert {f.state for f in found(doctor.matmul).values()} == {"problem"}


def test_a_slow_gpu_is_named(monkeypatch):
    seconds = {"cuda:0": 1.0e-3, "cuda:1": 1.3e-3, "cuda:2": 1.1e-3}

    def judged(device):
        return Finding(f"matmul on {device}", "ok", "", value=seconds[device], group="NVIDIA H200")

    monkeypatch.setattr("riverrun.launch.doctor_devices.judge_device", judged)
    for count, names in ((3, {"speed of matmul on cuda:1"}), (1, set())):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        findings = found(doctor.matmul)
        slow = {name: f for name, f in findings.items() if f.state == "warning"}
        assert slow.keys() == names and len(findings) == count + len(names)
    assert slow == {}
    seconds = {"cuda:0": 1.0e-3, "cuda:1": 1.3e-3}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    slow = found(doctor.matmul)["speed of matmul on cuda:1"]
    assert "30% slower than others, and too few of those" in slow.detail


def test_a_product_that_changes(monkeypatch):
    """The same inputs must give the same bits."""
    import torch

    real = torch.matmul
    calls = []

    def flaky(a, b, out):
        real(a, b, out=out)
        calls.append(1)
        if len(calls) == 6:
            out[3, 4] += 1e-3

    monkeypatch.setattr(torch, "matmul", flaky)
    [finding] = found(doctor.matmul).values()
    assert finding.state == "problem" and "not the same bits every time" in finding.detail and len(calls) > 6


@pytest.mark.parametrize(
    ("off", "state", "words"),
    [(0.0, "ok", "within"), (0.5, "ok", "within"), (90.0, "warning", "ahead of"), (-90.0, "warning", "behind")],
)
def test_the_clock(monkeypatch, tmp_path, off, state, words):
    real = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() + off)
    [finding] = found(doctor.clock, tmp_path).values()
    assert finding.state == state and words in finding.detail
    assert finding.value == pytest.approx(off, abs=0.3) and list(tmp_path.iterdir()) == []


def test_two_ranks_sum():
    assert all_reduce_sums("gloo") == [3.0, 3.0]


@pytest.mark.parametrize("sums", [[3.0, 1.0], RuntimeError("-- Process 0\nno route to host")])
def test_ranks_that_do_not_agree(monkeypatch, sums):
    def fake(backend):
        if isinstance(sums, Exception):
            raise sums
        return sums

    monkeypatch.setattr("riverrun.launch.all_reduce.all_reduce_sums", fake)
    finding = found(doctor.collectives)["all-reduce, gloo"]
    assert finding.state == "problem"
    assert ("no route to host" in finding.detail) if isinstance(sums, Exception) else ("[3.0, 1.0]" in finding.detail)


def test_exit_code_and_report(monkeypatch, tmp_path):
    def fine(folder):
        yield Finding("a", "ok", "good")
        yield Finding("b", "warning", "slow", "hurry")

    def broken(folder):
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "CHECKS", (fine,))
    result = run("--dir", str(tmp_path))
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["ok", "a:", "good"], ["warning", "b:", "slow"], ["fix:", "hurry"], ["0", "problems,", "1", "warnings"],
    ]  # fmt: skip
    monkeypatch.setattr(doctor, "CHECKS", (broken, fine))
    result = run("--dir", str(tmp_path))
    assert result.exit_code == 1
    assert "problem broken: OSError: no such device" in result.stdout and "ok      a: good" in result.stdout


def test_a_folder_that_is_missing(tmp_path):
    result = run("--dir", str(tmp_path / "no"))
    assert result.exit_code == 2 and "is not a folder: create it" in result.stderr


def test_this_machine():
    """The real checks, all of them: whatever they find, each says so in order."""
    result = run()
    for name in (
        "python",
        "torch",
        "imports",
        "triton on Hopper",
        "ptxas for Hopper",
        "C compiler",
        "CPU",
        "memory",
        "disk space",
        "matmul",
    ):
        assert f" {name}" in result.stdout
    assert result.exit_code == (1 if "problem " in result.stdout else 0)
