"""`riverrun data`: from source text to a tokenizer and token stores, and a look into them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from riverrun.launch.commands.data import app
from riverrun.train.data.store import TokenStore

JSON = Path(json.__file__).parent


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_from_text_to_a_store(tmp_path):
    model, out = tmp_path / "t.model", tmp_path / "out"
    shown = run("tokenizer", JSON, "--glob", "*.py", "--out", model, "--vocab-size", 500)
    assert "500 tokens" in shown
    shown = run(
        "prepare", JSON, "--glob", "*.py", "--tokenizer", model, "--out", out, "--held-out", 0.4, "--workers", 1
    )
    sources = [path.read_text() for path in JSON.rglob("*.py") if path.stat().st_size]
    train, held_out = TokenStore.open(out / "train"), TokenStore.open(out / "held_out")
    assert train.num_documents + held_out.num_documents == len(sources)
    assert train.num_bytes + held_out.num_bytes == sum(len(text.encode()) for text in sources)
    assert f"{train.num_tokens:,}" in shown and f"{held_out.num_tokens:,}" in shown

    shown = run("inspect", out)
    assert "correct" in shown and f"{train.num_tokens:,}" in shown and f"{held_out.num_bytes:,}" in shown
    assert "not beside the store" not in shown
    shown = run("inspect", out / "train", "--document", 1, "--tokens", 12)
    assert any(text.startswith(shown.splitlines()[-1]) for text in sources)

    shard = out / "train" / "00000.tokens"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert "not checked" in run("inspect", out / "train", "--no-verify")
    with pytest.raises(ValueError, match=r"00000\.tokens was altered"):
        run("inspect", out)


def test_what_was_left_out_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n{"body": ""}\n{"body": null}\n')
    shown = run(
        "prepare", tmp_path / "a.jsonl", "--field", "body", "--tokenizer", "bytes", "--out", tmp_path / "out",
        "--workers", 1,
    )  # fmt: skip
    assert "left out 2 documents: 1 empty, 1 no text" in shown


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(ValueError, match="not a token store"):
        run("inspect", tmp_path)
    with pytest.raises(ValueError, match="--format hub"):
        run("prepare", "name/of-nothing", "--tokenizer", "bytes", "--out", tmp_path / "out")
    (tmp_path / "a.txt").write_text("text")
    run("prepare", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out", "--workers", 1)
    with pytest.raises(ValueError, match="documents 0 to 0"):
        run("inspect", tmp_path / "out", "--document", 1)


def test_help_names_every_option():
    for command in ("tokenizer", "prepare", "inspect"):
        assert "Usage" in run(command, "--help")
