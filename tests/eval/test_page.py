"""`riverrun report`: everything of a run is on its page, once, and nothing else is needed to read it."""

import json
import re

import pytest
from typer.testing import CliRunner

from riverrun.eval.page import evaluations_of, page
from riverrun.launch import cli


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run<1>"
    folder.mkdir()
    lines = [
        {"kind": kind, "step": s, "tokens": 100 * s, "loss": 5.0 - s / 4, "bits_per_byte": 2.0, "mfu": None, "lr": 1e-3}
        for s in (1, 2, 3)
        for kind in ("train", "held_out")
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'  # killed in the middle
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.toml").write_text('name = "a & b"\n')
    (folder / "versions.json").write_text(json.dumps({"torch": "2.13", "cuda": None, "device": "H200"}))
    return folder


def evaluate(run_dir, name, **metrics):
    folder = run_dir / "eval" / name
    folder.mkdir(parents=True)
    found = {"alias": name} | {f"{k},none": v for k, v in metrics.items()} | {"loss_stderr,none": 0.25}
    document = {
        "results": {name: found},
        "config": {"model_args": "run x, step 3"},
        "n-samples": {name: {"effective": 1234}},
    }
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "curve.png").write_bytes(b"picture of " + name.encode())
    return folder


def test_the_page_has_all_of_it(run_dir):
    for name in ("perplexity", "length"):
        evaluate(run_dir, name, loss=1.23456, accuracy=None)
    text = page(run_dir, evaluations_of(run_dir))
    assert text.index("<h3>length</h3>") < text.index("<h3>perplexity</h3>")
    for part in (
        "<title>run&lt;1&gt;</title>", "step 3, 300 tokens, training loss 4.2500, held-out loss 4.2500",
        "<td>loss</td><td>1.235</td><td>0.25</td>", "<td>accuracy</td><td>–</td><td>–</td>", "1,234 samples",
        "<td>device</td><td>H200</td>", "a &amp; b", "run x, step 3",
    ):  # fmt: skip
        assert part in text, part
    images = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,', text)
    assert images == ["training curves", "curve", "curve"]
    assert "<td>cuda</td>" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing is fetched


def test_the_command(run_dir, tmp_path):
    result = CliRunner().invoke(cli.app, ["report", str(run_dir)])
    assert result.exit_code == 0, result.output
    assert "None yet" in (run_dir / "report.html").read_text()
    elsewhere = evaluate(tmp_path, "needle", loss=1.0)
    result = CliRunner().invoke(
        cli.app, ["report", str(run_dir), "--eval", str(elsewhere), "--out", str(tmp_path / "p.html")]
    )
    assert result.exit_code == 0 and "<h3>needle</h3>" in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize("arguments", [["nowhere"], ["RUN", "--eval", "nowhere"]])
def test_what_is_not_there(run_dir, arguments):
    result = CliRunner().invoke(cli.app, ["report", *(str(run_dir) if a == "RUN" else a for a in arguments)])
    assert result.exit_code == 2
    assert "is not a run folder" in result.output or "holds no results" in result.output
    assert not (run_dir / "report.html").exists()


def test_a_run_that_has_just_begun(run_dir):
    (run_dir / "metrics.jsonl").write_text("")
    assert "no training step recorded" in page(run_dir, [])
