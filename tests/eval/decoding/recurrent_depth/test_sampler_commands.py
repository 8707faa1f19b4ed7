"""`riverrun generate --sampler …` and `riverrun bench-samplers` as they are typed."""

import json
import re
from dataclasses import replace

import pytest
import torch
from eval_examples import hybrid, write_store
from looped import CORES
from torch.nn import functional as F
from typer.testing import CliRunner

from riverrun.eval.decoding.recurrent_depth.benchmark import agreement, text_loss
from riverrun.launch import cli
from riverrun.train.data.tokenizer import ByteTokenizer
from tests.modeling.depth.shapes import build

TEXT = "from swerve of shore to bend of bay, "


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of recurrent depth with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "looped"
    options, seed = CORES["gated_delta"]
    build(replace(options, vocab_size=ByteTokenizer.vocab_size), torch.float32, seed).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """One of fixed depth."""
    folder = tmp_path_factory.mktemp("models") / "fixed"
    hybrid().save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def generate(folder, *args):
    result = invoke("generate", "--model", folder, "--prompt", TEXT, "--max-new-tokens", 10, *args)
    assert result.exit_code == 0, result.output
    return result


def test_generate_by_every_sampler(folder):
    plain = generate(folder, "--greedy")
    assert generate(folder, "--greedy", "--sampler", "ar").stdout == plain.stdout
    assert generate(folder, "--greedy", "--num-steps", 5).stdout == plain.stdout  # the mean
    other = generate(folder, "--greedy", "--num-steps", 1)
    assert other.stdout != plain.stdout and "1.0 iterations a token, 1.0 in sequence" in other.stderr
    assert generate(folder, "--greedy", "--sampler", "speculative:draft_steps=2").stdout == plain.stdout
    shared = generate(folder, "--greedy", "--sampler", "ar:slots=1")
    assert generate(folder, "--greedy", "--sampler", "diffusion:inner_steps=5,ema=0").stdout == shared.stdout
    for spec in ("adaptive", "diffusion:inner_steps=2"):
        first = generate(folder, "--sampler", spec, "--seed", 4)
        assert first.stdout.startswith(TEXT) and first.stdout == generate(folder, "--sampler", spec, "--seed", 4).stdout
        assert first.stdout != generate(folder, "--sampler", spec, "--seed", 5).stdout
        assert re.search(r"tokens/s, decoding state [\d,]+ bytes a sample, [\d.]+ iterations a token", first.stderr)
    assert generate(folder, "--sampler", "adaptive", "--num-samples", 3).stdout.count("--- sample") == 3


def bench(folder, tmp_path, *args):
    return invoke("bench-samplers", folder, "--new-tokens", 9, "--out", tmp_path / "out", *args)


def test_samplers_are_measured_on_a_store(folder, tmp_path):
    store = write_store(tmp_path / "store", [TEXT * 2, "short", TEXT * 3, TEXT])
    samplers = ["ar", "speculative:draft_steps=2", "diffusion:inner_steps=2,threshold=0", "adaptive:threshold=0.5"]
    args = [part for spec in samplers for part in ("--sampler", spec)]
    result = bench(folder, tmp_path, "--data", store, "--prompt-tokens", 20, "--num-prompts", 2, *args)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "samplers.json").read_text())
    assert record["num_steps"] == 5 and record["prompts"] == 2 and record["prompt_tokens"] == [20, 20]
    assert record["sampling"] == "greedy" and record["environment"]["dtype"] == "float32"
    assert record["environment"]["torch"] == torch.__version__ and record["environment"]["device"].startswith("CPU")
    ar, speculative, diffusion, adaptive = record["samplers"]
    assert [row["sampler"] for row in record["samplers"]] == samplers
    assert ar["agreement"] == ar["exact"] == speculative["exact"] == 1 and ar["calls"] == ar["iterations"] == 5
    assert speculative["loss"] == ar["loss"] and speculative["mean_iterations"] == 5
    assert diffusion["mean_iterations"] == 6 and diffusion["calls"] == pytest.approx(2 * (8 + 2) / 8)
    assert adaptive["mean_iterations"] < 5 and adaptive["agreement"] <= 1
    for row in record["samplers"]:
        assert len(row["speeds"]) == 2 and 0 < min(row["speeds"]) <= row["tokens_per_second"] <= max(row["speeds"])
        assert [len(text) for text in row["texts"]] == [9, 9] and row["loss"] > 0
    table = (tmp_path / "out" / "samplers.md").read_text()
    for spec in samplers:
        assert f"| {spec}" in table and f"| {spec}" in result.stdout
    assert (tmp_path / "out" / "samplers.png").stat().st_size > 5000


def test_samplers_are_measured_on_texts(folder, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "past Eve", "and Adam's")))
    args = ["--prompts", texts, "--num-prompts", 2, "--num-steps", 7, "--sampler", "ar", "--sampler", "adaptive"]
    result = bench(folder, tmp_path, *args, "--temperature", 0.7, "--top-p", 0.9)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "samplers.json").read_text())
    assert record["prompt_tokens"] == [len(TEXT), 8] and record["sampling"] == "temperature 0.7, top-p 0.9"
    assert record["samplers"][0]["had"] == {"7": 16} and record["samplers"][0]["exact"] < 1


def test_agreement_counts_up_to_the_first_difference():
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert agreement([1, 2, 3, 4], [1, 2, 3, 4]) == 1 and agreement([5, 2], [1, 2]) == 0


@torch.no_grad()
def test_the_loss_is_of_the_text_alone():
    options, seed = CORES["mamba2"]
    model = build(options, seed=seed)
    prompt, text = [1, 2, 3], [4, 5, 6, 7]
    logits = model(torch.tensor([prompt + text]), num_steps=4).logits[0]
    expected = F.cross_entropy(logits[2:-1], torch.tensor(text))
    assert text_loss(model, prompt, text, 4) == pytest.approx(expected.item(), rel=1e-12)
    assert text_loss(model, prompt, text, 3) != pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--model", "FIXED", "--sampler", "diffusion"], "depth is fixed: leave out --sampler"),
        (["generate", "--model", "FIXED", "--num-steps", 4], "depth is fixed: leave out --sampler"),
        (["generate", "--model", "LOOPED", "--sampler", "ar", "--decoding", "dry"], "leave out --decoding and"),
        (["generate", "--model", "LOOPED", "--sampler", "ar", "--prefix", 3], "leave out --decoding and"),
        (["generate", "--model", "LOOPED", "--sampler", "jump"], "there is no sampler 'jump'"),
        (["generate", "--model", "LOOPED", "--num-steps", 0], "num_steps=0 must be at least 1"),
        (["generate", "--model", "LOOPED", "--sampler", "diffusion", "--num-samples", 2], "leave out --num-samples 2"),
        (["bench-samplers", "FIXED", "--prompts", "TEXTS"], "depth is fixed"),
        (["bench-samplers", "LOOPED"], "either --data STORE, or --prompts FILE"),
        (["bench-samplers", "LOOPED", "--data", "TEXTS"], "is no token store"),
        (["bench-samplers", "LOOPED", "--data", "STORE", "--prompt-tokens", 999], "lower --prompt-tokens"),
        (["bench-samplers", "LOOPED", "--prompts", "STORE"], "is a folder"),
        (["bench-samplers", "LOOPED", "--prompts", "TEXTS", "--top-p", 0.5], "add --temperature"),
        (["bench-samplers", "LOOPED", "--prompts", "TEXTS", "--sampler", "ar", "--sampler", "ar"], "given once"),
        (["bench-samplers", "LOOPED", "--prompts", "TEXTS", "--sampler", "ar:slots=6"], "ar.slots=6 are more than"),
    ],
)  # fmt: skip
def test_mistakes_are_told(args, message, folder, fixed, tmp_path):
    (tmp_path / "texts.txt").write_text(TEXT)
    places = {"FIXED": fixed, "LOOPED": folder, "TEXTS": tmp_path / "texts.txt"}
    if "STORE" in args:
        places["STORE"] = write_store(tmp_path / "store", [TEXT])
    result = invoke(*[places.get(arg, arg) for arg in args], *(["--prompt", "a"] if args[0] == "generate" else []))
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
