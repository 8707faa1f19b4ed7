"""Kernels check themselves once for each machine."""

import pytest
import torch

from riverrun.kernels.common import self_check
from riverrun.kernels.common.self_check import check_once, deviation
from riverrun.kernels.gated_delta import triton_launch, triton_op

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(self_check, "_agreed", set())


def test_agreement_is_remembered(monkeypatch, tmp_path):
    found = []
    for _ in range(2):
        check_once("op", {"K": 16}, CPU, lambda: found.append(1) or 1e-3, 1e-2)
    assert len(found) == 1
    monkeypatch.setattr(self_check, "_agreed", set())  # another process
    check_once("op", {"K": 16}, CPU, lambda: found.append(1) or 1e-3, 1e-2)
    assert len(found) == 1 and len(list(tmp_path.rglob("*.json"))) == 1
    check_once("op", {"K": 32}, CPU, lambda: found.append(1) or 1e-3, 1e-2)
    monkeypatch.setattr(self_check, "_sources", lambda: "edited")
    check_once("op", {"K": 16}, CPU, lambda: found.append(1) or 1e-3, 1e-2)
    assert len(found) == 3


@pytest.mark.parametrize("bad", [0.5, float("nan")])
def test_disagreement_is_an_error_every_time(bad, tmp_path):
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"op with K=16: on this machine \(interpreter, Triton .* differ .*chunked"
        ):
            check_once("op", {"K": 16}, CPU, lambda: bad, 1e-2)
    assert not list(tmp_path.rglob("*.json"))


def test_deviation():
    a = torch.tensor([3.0, 4.0])
    assert deviation([a, a], [a, 1.01 * a]) == pytest.approx(0.01 / 1.01)
    nan = torch.tensor([float("nan")])
    assert not deviation([nan, a], [nan, a]) <= 1


def test_gated_delta_checks_its_kernels(monkeypatch):
    monkeypatch.setattr(triton_launch, "HOPPER", triton_launch.Tiles(16, 64))
    triton_op.check(torch.float32, CPU, 2, 1, 16, 16, True)
    right = triton_op.delta_backward

    def wrong(*args):
        grad_q, grad_k, *rest = right(*args)
        return grad_q, 1.1 * grad_k, *rest

    monkeypatch.setattr(triton_op, "delta_backward", wrong)
    with pytest.raises(RuntimeError, match="gated_delta with n=1, H=1, K=16, V=16, exact=True"):
        triton_op.check(torch.float32, CPU, 1, 1, 16, 16, True)


def test_torch_compile_traces_through(monkeypatch):
    monkeypatch.setattr(triton_launch, "HOPPER", triton_launch.Tiles(16, 64))
    ran = []
    monkeypatch.setattr(triton_op, "check_once", lambda *args: ran.append(args[0]))

    def call(x):
        triton_op.check(torch.float32, CPU, 1, 1, 16, 16, True)
        return 2 * x

    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(torch.ones(3)), 2 * torch.ones(3))
    assert ran
