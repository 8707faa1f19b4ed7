"""Models of recurrent depth evaluated at a depth, or at several: against forward passes of that many iterations."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eval_examples import encoded, read_json, write_store
from torch.nn import functional as F
from typer.testing import CliRunner

from riverrun.eval.batches import packed_batches
from riverrun.eval.decoding.generate import Sampling, generate
from riverrun.eval.documents import open_documents
from riverrun.eval.lm_eval import RiverrunLM
from riverrun.eval.models import LoadedModel, load_model, sharing_models
from riverrun.eval.samples import SAMPLES
from riverrun.eval.tasks import depth_curve
from riverrun.eval.tasks.depth_curve import compare, iterates, measure
from riverrun.eval.tasks.perplexity import evaluate
from riverrun.launch import cli
from riverrun.modeling.depth.initial_state import draw
from riverrun.modeling.layout import Layout
from riverrun.train.data.tokenizer import ByteTokenizer
from tests.eval.test_commands import invoke
from tests.modeling.depth.shapes import SHAPES, build

V = ByteTokenizer.vocab_size
MIXED = replace(SHAPES["mamba2, para_lstm"], vocab_size=V)
ATTENTION = replace(SHAPES["attention"], vocab_size=V)


def without_start(options):
    return replace(options, depth=replace(options.depth, state_std=0.0))


@pytest.fixture
def looped(tmp_path):
    """A model folder with its tokenizer."""
    build(ATTENTION).save_pretrained(tmp_path / "looped")
    ByteTokenizer().save(tmp_path / "looped")
    return tmp_path / "looped"


# the measure


@torch.no_grad()
def plain(model, document, r, seq_len, shift):
    """(loss, logits) of every prediction of a document, a forward pass a segment; s_0 is that of shifted positions."""
    original, found = model.model.initial_state, []
    model.model.initial_state = lambda e, layout, row_keys=None: original(
        e, replace(layout, positions=layout.positions + shift)
    )
    for start in range(0, len(document) - 1, seq_len):
        tokens = torch.tensor([document[start : start + seq_len + 1]])
        logits = model(tokens[:, :-1], num_steps=r).logits[0]
        found.append((F.cross_entropy(logits, tokens[0, 1:], reduction="none"), logits))
    del model.model.initial_state
    return (torch.cat(part) for part in zip(*found))


@pytest.mark.parametrize("options", [ATTENTION, MIXED], ids=["attention", "mixed"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sums_are_those_of_forward_passes(options, batch_size):
    model, steps = build(options), [1, 2, 5]
    documents = encoded()
    found = measure(model, documents, steps, 16, batch_size)
    for record, document in zip(found, documents, strict=True):
        assert record["tokens"] == len(document) - 1
        for r in steps:
            (losses, a), (_, b) = (plain(model, document, r, 16, shift) for shift in (0, depth_curve.FAR))
            assert record[f"nats_r{r}"] == pytest.approx(losses.sum().item(), rel=1e-9)
            p, q = a.softmax(-1), b.softmax(-1)
            assert record[f"kl_r{r}"] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)
            a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
            distance = 2 * (a - b).norm(dim=-1) / (a.norm(dim=-1) + b.norm(dim=-1))
            assert record[f"distance_r{r}"] == pytest.approx(distance.sum().item(), rel=1e-9)
            assert distance.min() > 0


@torch.no_grad()
def test_one_run_gives_the_states_of_runs_that_end_earlier():
    """Bit by bit, in the model's own precision."""
    model = build(MIXED, torch.float32)
    ids = torch.tensor(encoded(["brings us by a commodius vicus"]))
    layout = Layout.of_rows((1, ids.shape[1]), torch.zeros(1, dtype=torch.long))
    for r, (first, second) in zip([1, 3, 4], iterates(model.model, ids, layout, [1, 3, 4]), strict=True):
        assert torch.equal(model.lm_head(first), model(ids, num_steps=r).logits)
        assert not torch.equal(first, second)


def test_distance_and_kl_by_hand():
    head = torch.nn.Linear(2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    a = torch.tensor([[3.0, 1.0], [1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[5.0, 3.0], [-1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    losses, distance, kl = compare(a, b, head, torch.tensor([0, 1, 0]))
    assert distance.tolist() == pytest.approx(
        [0, 2, 2]
    )  # a constant is no difference; opposites; nothing and something
    p = torch.tensor([1.0, -1.0], dtype=torch.float64).softmax(0)
    assert kl[1].item() == pytest.approx((p[0] - p[1]).item() * 2) and kl[0].item() == pytest.approx(0, abs=1e-12)
    assert losses.tolist() == pytest.approx([-p[0].log().item(), -p[1].log().item(), np.log(2)])


def test_logits_of_independent_draws_are_a_square_root_of_two_apart():
    keys = torch.arange(4000).view(2000, 2)
    draws = draw(keys, 400, 1.0).double().split(1000)
    head = SimpleNamespace(weight=torch.empty(400, 400))
    identity = torch.nn.Identity()
    identity.weight = head.weight
    _, distance, _ = compare(*draws, identity, torch.zeros(1000, dtype=torch.long))
    assert distance.mean().item() == pytest.approx(2**0.5, rel=0.01)


def test_a_core_that_contracts_forgets_where_it_started():
    model = build(ATTENTION)
    with torch.no_grad():
        model.model.core.injection.weight[:, : ATTENTION.hidden_size] *= 0.05
    (record,) = measure(model, [np.array(encoded()[2])], [1, 2, 4, 8], 128, 1)
    distances = [record[f"distance_r{r}"] / record["tokens"] for r in (1, 2, 4, 8)]
    assert distances[0] > 0.01 and distances == sorted(distances, reverse=True)
    assert distances[3] < 1e-3 * distances[0]


def test_a_start_from_zeros_has_no_other_draw():
    (record,) = measure(build(without_start(ATTENTION)), [np.array(encoded()[2])], [1, 3], 64, 1)
    assert [record[f"{name}_r{r}"] for name in ("distance", "kl") for r in (1, 3)] == [0, 0, 0, 0]


# the commands


def evaluated(*args):
    """By the whole command line."""
    result = CliRunner().invoke(cli.app, ["eval", *map(str, args)], env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 0, result.output


def test_the_curve(looped, store, tmp_path):
    from matplotlib import image

    args = ["eval", "perplexity", "--model", looped, "--data", store, "--seq-len", 16]
    result = invoke(*args, "--num-steps", "4,1,2", "--out", tmp_path / "curve")
    assert result.exit_code == 0, result.output
    document = read_json(tmp_path / "curve" / "results.json")
    found, details = document["results"]["perplexity_by_depth"], document["details"]["perplexity_by_depth"]
    assert document["configs"]["perplexity_by_depth"]["num_steps"] == [1, 2, 4]
    assert details["mean_recurrence"] == ATTENTION.depth.mean_recurrence
    for r in (1, 2, 4):
        assert invoke(*args, "--num-steps", r, "--out", tmp_path / f"r{r}").exit_code == 0
        alone = read_json(tmp_path / f"r{r}" / "results.json")
        assert alone["config"]["num_steps"] == r and f"num_steps={r}" in alone["config"]["model_args"]
        for name in ("loss", "perplexity", "bits_per_byte", "loss_stderr"):
            ours = f"loss_r{r}_stderr" if name == "loss_stderr" else f"{name}_r{r}"
            assert found[f"{ours},none"] == pytest.approx(alone["results"]["perplexity"][f"{name},none"], rel=1e-9)
        assert f"{found[f'loss_r{r},none']:.4f} ± " in result.stdout
        assert 0 < found[f"distance_r{r},none"] < 2 and found[f"kl_r{r},none"] > 0
    assert len({found[f"loss_r{r},none"] for r in (1, 2, 4)}) == 3
    assert image.imread(tmp_path / "curve" / "depth.png").shape[1] > 500
    lines = (tmp_path / "curve" / SAMPLES).read_text()
    assert len(lines.splitlines()) == 5
    assert invoke(*args, "--num-steps", "1,2,4", "--out", tmp_path / "curve").exit_code == 0
    assert (tmp_path / "curve" / SAMPLES).read_text() == lines
    other = invoke(*args, "--num-steps", "1,2", "--out", tmp_path / "curve")
    assert "(num_steps differ)" in str(other.exception)


def test_depths_do_not_share_samples(looped, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["eval", "perplexity", "--model", looped, "--data", store]
    for steps in ([], ["--num-steps", 2], ["--num-steps", 3], ["--num-steps", "2,3"]):
        assert invoke(*args, *steps).exit_code == 0
    folders = [tmp_path / "eval" / "perplexity" / name for name in (".", "r2", "r3", "by_depth")]
    assert all((folder / SAMPLES).is_file() for folder in folders)
    other = invoke(*args, "--num-steps", 4, "--out", folders[1])
    assert "(model_fingerprint differ)" in str(other.exception)


def test_the_default_is_the_mean_in_training(looped, store, tmp_path):
    mean = ATTENTION.depth.mean_recurrence
    args = ["perplexity,length", "--model", looped, "--data", store, "--states", 0]
    evaluated(*args, "--out", tmp_path / "a")
    evaluated(*args, "--num-steps", mean, "--out", tmp_path / "b")
    evaluated(*args, "--num-steps", mean + 1, "--out", tmp_path / "c")
    for task in ("perplexity", "length"):
        first, second, third = ((tmp_path / name / task / SAMPLES).read_text() for name in "abc")
        assert first == second != third


def test_streaming_at_a_depth(looped, store, tmp_path):
    args = ["eval", "perplexity", "--model", looped, "--data", store, "--num-steps", 2]
    assert invoke(*args, "--streaming", "--seq-len", 7, "--out", tmp_path / "s").exit_code == 0
    assert invoke(*args, "--seq-len", 200, "--out", tmp_path / "p").exit_code == 0
    streamed, whole = (read_json(tmp_path / name / "results.json")["results"]["perplexity"] for name in "sp")
    assert streamed["loss,none"] == pytest.approx(whole["loss,none"], rel=1e-9)


def test_a_loaded_model_decodes_at_its_depth(looped):
    prompt = encoded()[1]
    with sharing_models():
        models = {r: load_model(looped, device="cpu", num_steps=r).model for r in (None, 1, 6)}
    assert len(set(map(id, models.values()))) == 3
    for r, model in models.items():
        tokens = generate(model, prompt, Sampling(greedy=True), max_new_tokens=5, eos_id=None).tokens[0]
        expected = list(prompt)
        with torch.no_grad():
            for _ in range(5):
                logits = models[None](torch.tensor([expected]), num_steps=r).logits
                expected.append(int(logits[0, -1].argmax()))
        assert tokens == expected[len(prompt) :]


def test_lm_eval_at_a_depth(looped):
    row = encoded()[2]
    for r in (1, 5):
        model = build(ATTENTION)
        lm = RiverrunLM(str(looped), device="cpu", num_steps=str(r))
        with torch.no_grad():
            losses = F.cross_entropy(
                model(torch.tensor([row[:-1]]), num_steps=r).logits[0], torch.tensor(row[1:]), reduction="none"
            )
        ((score, _),) = lm._loglikelihood_tokens([(("", ""), row[:10], row[10:])])
        assert score == pytest.approx(-losses[9:].sum().item(), rel=1e-8)
        assert lm._stream(row) == pytest.approx(-losses.sum().item(), rel=1e-8)
        assert lm.get_model_info()["model_sha"] != RiverrunLM(str(looped), device="cpu").loaded.fingerprint


def test_other_tasks_run_at_a_depth(looped, tmp_path):
    """Each names it in its results."""
    args = ["--model", looped, "--num-steps", 2, "--limit", 1, "--out", tmp_path / "out"]
    each = {
        "needle": ["--kind", "passkey", "--length", 300, "--depth", 0.5, "--samples", 1],
        "jrt": ["--context-length", 200],
        "repetition": ["--decoding", "greedy", "--max-new-tokens", 2, "--no-recall", "--sentences", 0],
    }
    for task, own in each.items():
        evaluated("--overwrite", task, *args, *own)
        assert read_json(tmp_path / "out" / "results.json")["config"]["num_steps"] == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-steps", "0"], "num_steps=0 must be at least 1"),
        (["--num-steps", "0,2"], "num_steps=0,2 must be different numbers of iterations, 1 or more each"),
        (["--num-steps", "2,1,2"], "num_steps=1,2,2 must be different numbers"),
        (["--num-steps", "few"], "'few' must be whole numbers, with commas between several"),
        (["--num-steps", "1,2", "--streaming"], "leave it out, or give one of 1,2"),
        (["--num-steps", "1,2", "--batch-size", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_value_errors(looped, store, args, message, tmp_path):
    result = invoke("eval", "perplexity", "--model", looped, "--data", store, "--out", tmp_path / "out", *args)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", ["2", "1,2"])
def test_models_of_fixed_depth_are_refused(saved, foreign, store, steps, tmp_path):
    for model in (saved, foreign):
        result = invoke("eval", "perplexity", "--model", model, "--data", store, "--num-steps", steps)
        assert isinstance(result.exception, ValueError)
        assert "has no recurrent core (model.depth), whose iterations num_steps counts" in str(result.exception)


def test_a_text_with_nothing_to_score(tmp_path):
    model = LoadedModel("looped", build(ATTENTION), ByteTokenizer(), "a looped model", "0" * 64)
    documents = open_documents(write_store(tmp_path / "store", ["", ""]), model)
    with pytest.raises(ValueError, match="nothing to score"):
        depth_curve.run(model, documents, tmp_path / "out", steps=[1, 2], seq_len=8, batch_size=2)


def test_the_mean_agrees_with_the_plain_evaluation():
    """Of a model at its own depth."""
    model, documents = build(MIXED), [np.array(tokens) for tokens in encoded()]
    mean = MIXED.depth.mean_recurrence
    records = measure(model, documents, [mean], 16, 2)
    found = depth_curve.depth_of(records, mean)
    expected = evaluate(model, packed_batches(documents, 16, 2))
    assert found.result.loss == pytest.approx(expected.loss, rel=1e-9)
    assert found.result.stderr == pytest.approx(expected.stderr, rel=1e-9)
