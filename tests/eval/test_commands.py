"""`riverrun eval perplexity` and `riverrun generate` as they are typed."""

import re

import pytest
import typer
from eval_examples import TEXTS, read_json
from typer.testing import CliRunner

from riverrun.launch.commands import eval as eval_command
from riverrun.launch.commands import generate as generate_command

app = typer.Typer()
app.add_typer(eval_command.app, name="eval")
app.command("generate")(generate_command.generate)


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "160", "TERM": "dumb"})


def test_perplexity_prints_and_writes_its_results(saved, store, tmp_path):
    result = invoke("eval", "perplexity", "--model", saved, "--data", store, "--seq-len", 16, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    document = read_json(tmp_path / "out" / "results.json")
    found = document["results"]["perplexity"]
    for text in (f"{found['loss,none']:.4f} ± ", f"{found['bits_per_byte,none']:.4f}", "8–15", "documents"):
        assert text in result.stdout
    assert found["loss_stderr,none"] > 0 and found["alias"] == "perplexity"
    assert document["n-samples"] == {"perplexity": {"original": 5, "effective": 5}}
    assert document["versions"] == {"perplexity": 1} and document["higher_is_better"]["perplexity"]["loss"] is False
    assert document["config"]["device"] == "cpu" and document["config"]["random_seed"] == 0
    assert len(document["config"]["model_fingerprint"]) == 64
    assert document["configs"]["perplexity"]["seq_len"] == 16
    for key in ("date", "git_hash", "environment", "transformers_version", "total_evaluation_time_seconds"):
        assert key in document
    details = document["details"]["perplexity"]
    assert details["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert sum(bucket["tokens"] for bucket in details["by_position"]) == details["tokens_scored"]


def test_the_plot_shows_the_buckets(saved, store, tmp_path):
    from matplotlib import image

    invoke("eval", "perplexity", "--model", saved, "--data", store, "--out", tmp_path)
    pixels = image.imread(tmp_path / "loss_by_position.png")[..., :3]
    assert pixels.shape[0] > 300 and pixels.shape[1] > 500
    blue = (pixels[..., 2] > pixels[..., 0] + 0.3).any(axis=0)  # columns with a part of the curve
    assert blue.mean() > 0.6


def test_streaming_and_limits(saved, store, tmp_path):
    common = ["eval", "perplexity", "--model", saved, "--data", store, "--seq-len", "16", "--limit", 3]
    assert invoke(*common, "--streaming", "--out", tmp_path / "s").exit_code == 0
    assert invoke(*common, "--out", tmp_path / "p").exit_code == 0
    streamed, cut = (read_json(tmp_path / d / "results.json")["details"]["perplexity"] for d in "sp")
    assert streamed["by_position"][-1]["first"] == 64 and cut["by_position"][-1]["first"] == 16
    assert streamed["tokens_scored"] == cut["tokens_scored"] == sum(len(t.encode()) for t in TEXTS[:3])


def test_generate_is_the_same_for_a_seed(saved, tmp_path):
    def run(*args):
        result = invoke("generate", "--model", saved, "--max-new-tokens", 20, *args)
        assert result.exit_code == 0, result.output
        return result

    first = run("--prompt", "river", "--seed", 4)
    assert first.stdout.startswith("river") and first.stdout == run("--prompt", "river", "--seed", 4).stdout
    assert first.stdout != run("--prompt", "river", "--seed", 5).stdout
    assert re.search(r"prompt of 5 tokens .* new tokens, [\d.,]+ tokens/s, decoding state [\d,]+ bytes", first.stderr)
    (tmp_path / "prompt.txt").write_text("river")
    assert run("--prompt-file", tmp_path / "prompt.txt", "--seed", 4).stdout == first.stdout
    assert run("--prompt", "river", "--greedy").stdout == run("--prompt", "river", "--top-k", 1, "--seed", 9).stdout
    assert run("--prompt", "river", "--num-samples", 3).stdout.count("--- sample") == 3
    assert run().stderr.startswith("prompt of 1 tokens")  # begins with the beginning-of-sequence token


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval", "perplexity", "--model", "none/at/all", "--data", "x"], "there is no folder"),
        (["eval", "perplexity", "--model", "SAVED", "--data", "none"], "there is no none"),
        (["eval", "perplexity", "--model", "SAVED", "--data", "STORE", "--batch-size", "0"], "must be at least 1"),
        (["generate", "--model", "SAVED", "--prompt", "a", "--prompt-file", "b"], "not both"),
        (["generate", "--model", "SAVED", "--temperature", "0"], "use greedy"),
        (["generate", "--model", "SAVED", "--device", "cuda:99"], "--device cpu"),
    ],
)
def test_mistakes_are_value_errors(args, message, saved, store, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = invoke(*[{"SAVED": saved, "STORE": store}.get(arg, arg) for arg in args])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
