import builtins
import json
import math

import pytest
import torch

from riverrun.train import metrics, plot
from riverrun.train.config import LogConfig


def test_a_resume_drops_later_records_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1 / step}) + "\n" for step in (2, 4, 6)]
    path.write_text("".join(lines) + '{"kind": "train", "st')
    file = metrics.MetricsFile(path, 4)
    file.write({"kind": "train", "step": 6, "loss": 0.5})
    file.close()
    assert [(r["step"], r["loss"]) for r in metrics.read(path)] == [(2, 0.5), (4, 0.25), (6, 0.5)]


def test_the_window_weighs_by_targets_and_leaves_skipped_steps_out():
    window = metrics.Window()
    assert window.means() == {}
    window.add({"loss": (30.0, 10), "other": (0.0, 0)}, False)
    assert window.means() == {"loss": 3.0, "other": None}
    window.add({"loss": (float("nan"), 10), "other": (9.0, 1)}, True)
    window.add({"loss": (10.0, 30), "other": (4.0, 8)}, False)
    assert window.means() == {"loss": 1.0, "other": 0.5} and window.skipped == 1
    assert metrics.Window(**json.loads(json.dumps(vars(window)))) == window


def test_the_window_adds_up_what_the_solvers_did():
    from riverrun.kernels.common.shooting import take_statistics
    from riverrun.kernels.para_gru import para_gru

    take_statistics()
    window = metrics.Window()
    gates, weight = torch.randn(1, 64, 3, 2), torch.full((3, 2), 0.5)
    para_gru(gates, weight, backend="chunked", chunk_size=16)
    window.add_solves()
    with pytest.warns(RuntimeWarning, match="did not converge"):
        para_gru(gates / 10, weight * 8, backend="chunked", chunk_size=16, max_passes=1)
    window.add_solves()
    assert metrics.Window(**json.loads(json.dumps(vars(window)))) == window
    found = metrics.solver_metrics(metrics.merge_solves(window.solves, window.solves))
    assert found["para_gru_fallbacks"] == 0.5 and found["para_gru_passes"] >= 2 and 0 <= found["para_gru_change"] < 1e-5
    assert metrics.solver_metrics(metrics.Window().solves) == {}


def test_bits_per_byte():
    assert metrics.bits_per_byte(math.log(256), 1.0) == pytest.approx(8)
    assert metrics.bits_per_byte(math.log(16), 4.0) == pytest.approx(1)


def test_the_peak_is_known_by_name_or_from_the_recipe(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert metrics.peak_flops(LogConfig(), cpu, "bf16") is None
    assert metrics.peak_flops(LogConfig(peak_tflops=2), cpu, "bf16") == 2e12
    for name, peak in [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_flops(LogConfig(), cuda, "bf16") == peak
        assert metrics.peak_flops(LogConfig(), cuda, "fp32") is None


def test_wandb_asked_for_but_missing(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'riverrun\[wandb\]'"):
        metrics.Dashboards(LogConfig(wandb=True), tmp_path, {}, 0)


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = metrics.Dashboards(LogConfig(), tmp_path, {}, 0)
    boards.write({"kind": "train", "step": 3, "loss": 2.0, "mfu": None})
    boards.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.0)]


@pytest.mark.parametrize("bits", [1.5, None])
def test_the_loss_curve_is_a_picture(tmp_path, bits):
    found = [
        {"kind": kind, "step": step, "tokens": 100 * step, "loss": 3.0 / step, "bits_per_byte": bits}
        for step in (1, 2, 3)
        for kind in ("train", "held_out")
    ]
    plot.loss_curve(found, tmp_path / "loss.png", "test")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot.loss_curve([], tmp_path / "empty.png", "nothing yet")


def test_the_window_adds_up_what_memories_noted(monkeypatch):
    noted = iter([{"memory_loss": [3.0, 4.0]}, {"memory_loss": [1.0, 4.0], "memory_eta": [0.5, 1.0]}])
    monkeypatch.setattr(metrics, "take_noted", lambda: next(noted))
    window = metrics.Window()
    window.add_memories()
    window.add_memories()
    assert metrics.Window(**json.loads(json.dumps(vars(window)))) == window
    assert metrics.memory_metrics(window.memories) == {"memory_loss": 0.5, "memory_eta": 0.5}
    assert metrics.memory_metrics(metrics.Window().memories) == {}
