"""`riverrun bench` on a GPU: ours through Triton, cuDNN beside it, memory and errors measured."""

import json

import pytest
from typer.testing import CliRunner

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
    assert [point["case"]["T"] for point in document["sweep"]] == [16, 32, 64]
    assert all(c["backward"]["median"] > 0 for point in document["sweep"] for c in point["contenders"])
