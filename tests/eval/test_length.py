"""The loss by position against whole forward passes, verdicts on planted curves, states against stepping."""

import json

import numpy as np
import pytest
import torch
import typer
from eval_examples import encoded, exact_hybrid, hybrid, read_json
from torch.nn import functional as F
from typer.testing import CliRunner

from riverrun.eval.documents import open_documents
from riverrun.eval.models import load_model
from riverrun.eval.tasks import length as task
from riverrun.eval.tasks import state_statistics
from riverrun.launch.commands import length as commands
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.memory_options import TitansLMMOptions
from riverrun.modeling.mixer_options import AttentionOptions, GatedDeltaOptions, LSTMOptions, Mamba2Options
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions

TEXT = "riverrun, past Eve and Adam's, from swerve of shore to bend of bay. " * 40


def whole_losses(model, tokens):
    """The loss at position 1, 2, … from one forward pass."""
    ids = torch.tensor(np.asarray(tokens))[None]
    with torch.no_grad():
        return F.cross_entropy(model(ids[:, :-1]).logits[0].double(), ids[0, 1:], reduction="none").numpy()


# The curve


@pytest.mark.parametrize("chunk_len", [3, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("max_length", [None, 50])
def test_the_streamed_curve_is_that_of_whole_forward_passes(chunk_len, batch_size, max_length):
    model = exact_hybrid()
    bounds = task.edges(max_length or 200, 24)
    sums = task.OctavesAndBuckets(5, bounds)
    chosen = task.sequences(encoded(), max_length, False)
    task.measure(model, chosen, sums, chunk_len=chunk_len, batch_size=batch_size)
    curve = task.Curve.of(bounds, sums.records())
    expected: dict[int, list[float]] = {}
    for tokens in encoded():
        for position, loss in enumerate(whole_losses(model, tokens[: (max_length or 10**9) + 1]), 1):
            expected.setdefault(int(np.searchsorted(bounds, position, side="right")) - 1, []).append(loss)
    assert len(curve.buckets) == len(expected)
    for k, bucket in enumerate(curve.buckets):
        assert (bucket.first, bucket.last) == (bounds[k], bounds[k + 1] - 1)
        assert bucket.tokens == len(expected[k])
        assert bucket.loss == pytest.approx(np.mean(expected[k]), rel=1e-9)
    assert curve.tokens.shape[0] == 5 and curve.tokens.sum() == sum(record["tokens"] for record in sums.records())


def test_buckets_are_quarters_of_octaves_from_the_training_length():
    assert task.edges(32, 16).tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 14, 17, 20, 23, 27, 33]
    assert task.edges(19, 16).tolist()[-3:] == [14, 17, 20]  # 19 = ⌊16·2^¼⌋
    assert task.edges(20, 16).tolist()[-3:] == [14, 17, 21]  # a bucket of one position is not left
    assert task.edges(17, 16).tolist()[-3:] == [14, 17, 18]  # but T is always an end
    assert task.edges(8, None).tolist() == [1, 2, 3, 4, 5, 6, 7, 9]
    for T in (1, 7, 500, 4096):
        bounds = task.edges(1 << 20, T)
        assert (np.diff(bounds) > 0).all() and T + 1 in bounds and bounds[-1] == (1 << 20) + 1


def test_documents_are_joined_and_cut():
    documents = [[9, 1, 2], [9, 3], [9], [9, 4, 5, 6, 7, 8, 10]]
    joined = [row.tolist() for row in task.sequences(documents, 3, True)]
    assert joined == [[9, 1, 2, 9], [3, 9, 9, 4], [5, 6, 7, 8]]
    joined = [row.tolist() for row in task.sequences(documents, 3, True, opening=9)]
    assert joined == [[9, 1, 2, 3], [9, 4, 5, 6], [9, 7, 8, 10]]
    assert [row.tolist() for row in task.sequences(documents, 3, False)] == [*documents[:3], [9, 4, 5, 6]]
    with pytest.raises(ValueError, match="give --max-length"):
        list(task.sequences(documents, None, True))
    with pytest.raises(ValueError, match="together have 13 tokens"):
        list(task.sequences(documents, 100, True))


# The verdict


def planted(shape, documents=40, length=1024, T=128, noise=0.3, own=0.2, seed=0):
    """A curve whose expected loss at position t is shape(t / T), with a level of its own for each document."""
    rng = np.random.default_rng(seed)
    sums = task.OctavesAndBuckets(documents, task.edges(length, T))
    positions = np.arange(1, length + 1)
    for number in range(documents):
        losses = (shape(positions / T) + noise * rng.standard_normal(length)) * (1 + own * rng.uniform(-1, 1))
        sums.add(losses, positions, np.full(length, number))
    return task.Curve.of(task.edges(length, T), sums.records())


def falling(u):
    return 2 + 0.3 * u**-0.5  # as within training, and on


@pytest.mark.parametrize(
    ("shape", "verdict"),
    [
        (falling, "extrapolates"),
        (lambda u: falling(u) * np.where(u > 1, 1.02, 1), "extrapolates"),
        (lambda u: falling(u) * np.where(u > 4, 1.4, 1), "forgets"),
        (lambda u: falling(u) * np.where(u > 1, u**0.2, 1), "forgets"),
        (lambda u: falling(u) * np.where(u > 2, u**0.8, 1), "collapses"),
        (lambda u: falling(u) * np.where((u > 2) & (u < 4), 3.0, 1), "collapses"),  # though it comes back
        (lambda u: np.where(u > 4, 4.0, 2.0), "cannot tell"),
        (lambda u: np.where(u > 4, 2.1, 2.0), "cannot tell"),
    ],
)
def test_verdicts_on_planted_curves(shape, verdict):
    found = task.judge(planted(shape, noise=0.5), 128)
    assert found.verdict == verdict, found
    low, high = found.interval
    assert low <= found.ratio <= high and found.reach == 1024


def test_early_positions_do_not_excuse_a_collapse():
    """The maximum within T would be 6, of which 5 is less than twice."""
    found = task.judge(planted(lambda u: np.where(u > 1, 5.0, np.where(u < 0.05, 6.0, 2.0))), 128)
    assert found.verdict == "collapses"


def test_the_data_may_not_decide():
    steady = planted(falling, documents=7)
    assert task.judge(steady, 128).verdict == "cannot tell" and "fewer than 8" in task.judge(steady, 128).reason
    assert "pass --train-length" in task.judge(steady, None).reason
    short = task.judge(planted(falling, length=200), 128)
    assert short.verdict == "cannot tell" and "twice the 128" in short.reason and short.reach == 200
    assert task.judge(planted(lambda u: np.where(u > 1, 9.0, 2.0), length=200), 128).verdict == "collapses"
    noisy = task.judge(planted(falling, documents=8, noise=6), 128)
    assert noisy.verdict == "cannot tell" and "more documents" in noisy.reason


def test_a_flat_curve_is_rarely_called_anything_else():
    found = [task.judge(planted(lambda u: 2 + 0 * u, documents=20, noise=1.0, seed=s), 128).verdict for s in range(20)]
    assert not {"forgets", "collapses"} & set(found)


def test_long_documents_are_compared_with_themselves():
    """Those that go on beyond T have a higher loss everywhere: that is no forgetting."""
    sums = task.OctavesAndBuckets(40, task.edges(512, 128))
    rng = np.random.default_rng(0)
    for number in range(40):
        length, level = (512, 4.0) if number < 20 else (128, 1.0)
        sums.add(level + 0.1 * rng.standard_normal(length), np.arange(1, length + 1), np.full(length, number))
    assert task.judge(task.Curve.of(task.edges(512, 128), sums.records()), 128).verdict == "extrapolates"


def test_groups_of_documents_stand_for_many(monkeypatch):
    curve = planted(falling, documents=100, noise=1.0)
    plain, band = task.judge(curve, 128), curve.band()
    monkeypatch.setattr(task, "GROUPS", 30)
    grouped = task.judge(curve, 128)
    assert grouped.ratio == pytest.approx(plain.ratio, rel=1e-12)
    assert grouped.interval == pytest.approx(plain.interval, rel=0.02)
    assert curve.band() == pytest.approx(band, rel=0.05)


def test_the_band_covers_the_truth():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(60):
        nats = rng.normal(3, 1, (30, 1)) * 10
        low, high = task.Curve(np.array([1, 11]), nats, np.full((30, 1), 10)).band()[:, 0]
        inside.append(low < 3 < high)
    assert 0.85 < np.mean(inside) <= 1


# The states


def recurrent(**mixers) -> RiverrunForCausalLM:
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=258, hidden_size=16, num_hidden_layers=len(mixers), intermediate_size=24, initializer_range=0.5,
        layer_pattern=tuple(mixers), **mixers,
    )  # fmt: skip
    return RiverrunForCausalLM(RiverrunConfig.from_options(options)).eval().double()


MAMBA2 = Mamba2Options(head_dim=8, state_size=6, chunk_size=8)
DELTA = GatedDeltaOptions(num_heads=2, head_dim=4, chunk_size=8)


@torch.no_grad()
def stepped(model, tokens, places):
    """The cache's layers after `places` tokens, one token at a time through the model's own forward."""
    cache, found = RiverrunCache(model.config.num_hidden_layers), []
    for seen, token in enumerate(tokens, 1):
        model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        if seen in places:
            found.append([{name: state.clone() for name, state in layer.items()} for layer in cache.layers])
    return found


@pytest.mark.parametrize("chunk_len", [5, 64])
def test_norms_are_those_of_stepping(chunk_len):
    model = exact_hybrid()
    rows = [np.arange(40) * 7 % 256, np.arange(45) * 5 % 256]
    found = state_statistics.measure(model, rows, train_length=10, chunk_len=chunk_len)
    assert found.positions == (1, 2, 4, 8, 10, 16, 32, 40) and found.reference == 4 and found.documents == 2
    assert {(head.layer, head.mixer) for head in found.heads} == {
        (0, "mamba2"), (1, "gated_delta"), (2, "para_gru"), (3, "para_lstm"),
    }  # fmt: skip
    layers = [stepped(model, row[:40].tolist(), found.positions) for row in rows]
    for head in found.heads:
        name = {"mamba2": "ssd", "gated_delta": "delta"}.get(head.mixer, "cell")
        for p in range(8):
            states = [document[p][head.layer][name][0] for document in layers]
            states = [state[head.head] if name != "cell" else state for state in states]
            assert head.norm[p] == pytest.approx(np.mean([state.norm().item() for state in states]), rel=1e-6)
        assert found.growth(head) == pytest.approx(head.norm[-1] / head.norm[4])


def test_retention_is_what_is_left_of_a_change_of_the_first_state():
    """The first layer's inputs do not depend on states, so a change of its state decays by α alone."""
    model, tokens = recurrent(mamba2=MAMBA2), (np.arange(9) * 7 % 256).tolist()
    with torch.no_grad():
        ends = []
        for change in (0.0, 1.0):
            cache = RiverrunCache(1)
            model(torch.tensor([tokens[:1]]), past_key_values=cache)
            cache.layers[0]["ssd"] += change
            model(torch.tensor([tokens[1:]]), past_key_values=cache)
            ends.append(cache.layers[0]["ssd"][0].clone())
    left = ends[1] - ends[0]  # (H, P, N)
    found = state_statistics.measure(model, [tokens], train_length=None, chunk_len=6)
    assert len(found.heads) == len(left) == 4
    for head in found.heads:
        assert head.retention[0] == 1 and (np.diff(head.retention) < 0).all()
        assert left[head.head].numpy() == pytest.approx(head.retention[-1], rel=1e-9)


@torch.no_grad()
def test_retention_of_gated_delta_is_an_upper_bound():
    model, tokens = recurrent(gated_delta=DELTA), (np.arange(12) * 7 % 256).tolist()
    found = state_statistics.measure(model, [tokens], train_length=None, chunk_len=5)
    ends = []
    for change in (0.0, 1.0):
        cache = RiverrunCache(1)
        model(torch.tensor([tokens[:1]]), past_key_values=cache)
        cache.layers[0]["delta"] += change
        model(torch.tensor([tokens[1:]]), past_key_values=cache)
        ends.append(cache.layers[0]["delta"][0].clone())
    for head in found.heads:
        left = (ends[1] - ends[0])[head.head]
        assert 0 < left.square().mean().sqrt() <= head.retention[-1]  # of a change by ones
    without = recurrent(gated_delta=GatedDeltaOptions(num_heads=2, head_dim=4, chunk_size=8, use_gate=False))
    found = state_statistics.measure(without, [tokens], train_length=None, chunk_len=5)
    assert all((head.retention == 1).all() for head in found.heads)


def test_other_mixers_have_norms_only():
    found = state_statistics.measure(
        recurrent(lstm=LSTMOptions(head_dim=8)), [np.arange(9)], train_length=4, chunk_len=4
    )  # fmt: skip
    assert [head.head for head in found.heads] == list(range(len(found.heads))) and len(found.heads) > 1
    assert all(head.retention is None for head in found.heads)
    assert state_statistics.summarize(found, 1, {}).metrics["heads_kept"] is None
    states = stepped(recurrent(lstm=LSTMOptions(head_dim=8)), range(9), [9])[0][0]["cell"][0]  # (2, H, K)
    assert [head.norm[-1] for head in found.heads] == pytest.approx(states.norm(dim=(0, 2)).tolist(), rel=1e-6)


def test_a_model_without_states_is_refused():
    attention = recurrent(attention=AttentionOptions(num_heads=2, num_kv_heads=1, head_dim=4))
    with pytest.raises(ValueError, match="layers is recurrent: --states 0"):
        state_statistics.measure(attention, [np.arange(9)], train_length=4, chunk_len=4)
    with pytest.raises(ValueError, match="documents with tokens"):
        state_statistics.measure(hybrid(), [], train_length=4, chunk_len=4)


# The command


app = typer.Typer()
app.command()(commands.length)
app.command()(commands.needle)


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "160", "TERM": "dumb"})


def test_the_command_writes_results_and_plots(saved, tmp_path):
    from matplotlib import image

    (tmp_path / "a.txt").write_text(TEXT)
    result = invoke(
        "length", "--model", saved, "--data", tmp_path / "a.txt", "--concatenate", "--max-length", 256,
        "--train-length", 64, "--chunk-len", 100, "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = read_json(tmp_path / "out" / "results.json")
    details = document["details"]["length"]
    assert details["verdict"] in ("extrapolates", "forgets", "cannot tell") and details["verdict"] in result.stdout
    assert details["reach"] == 256 and details["ratio_95"][0] <= document["results"]["length"]["ratio,none"]
    assert document["configs"]["length"]["train_length"] == 64
    positions = details["by_position"]
    assert positions[-1]["last"] == 256 and positions[-1]["loss_95"][0] < positions[-1]["loss"]
    rows = len(TEXT.encode() + b"\n") // 257
    assert document["n-samples"]["length"]["effective"] == rows == 10
    assert positions[-1]["loss_so_far"] == pytest.approx(document["results"]["length"]["loss,none"])
    states = document["details"]["state_statistics"]
    assert states["positions"][-1] == 257 and {head["layer"] for head in states["heads"]} == {0, 1, 2, 3}
    for name in ("length.png", "states.png"):
        assert image.imread(tmp_path / "out" / name).shape[0] > 300


def test_a_foreign_model_is_evaluated_up_to_its_limit(foreign, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[i : i + 90]}) + "\n" for i in range(10)))
    loaded = load_model(foreign)
    options = {"train_length": 16, "chunk_len": 8, "batch_size": 3, "concatenate": False}
    result, record = task.run(loaded, open_documents(path, loaded), tmp_path / "a", max_length=None, **options)
    assert result.total.tokens == 10 * 64 and result.verdict.reach == 64
    documents = list(open_documents(path, loaded).tokens)
    expected = np.mean([whole_losses(loaded.model, tokens[:65]) for tokens in documents])
    assert record.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    joining = {**options, "concatenate": True}
    joined, _ = task.run(loaded, open_documents(path, loaded), tmp_path / "b", max_length=60, **joining)
    assert joined.total.tokens == 60 * (10 * 91 // 60)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        task.run(loaded, open_documents(path, loaded), tmp_path / "c", max_length=65, **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--concatenate"], "give --max-length"),
        (["--max-length", "0"], "must be at least 1"),
        (["--train-length", "-3"], "must be at least 1"),
        (["--chunk-len", "0"], "must be at least 1"),
        (["--concatenate", "--max-length", "999999"], "lower --max-length"),
    ],
)
def test_mistakes_are_value_errors(args, message, saved, store, tmp_path):
    result = invoke("length", "--model", saved, "--data", store, "--out", tmp_path / "out", *args)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_without_a_training_length_there_is_no_verdict(saved, store, tmp_path):
    result = invoke("length", "--model", saved, "--data", store, "--states", 0, "--out", tmp_path)
    assert result.exit_code == 0 and "cannot tell" in result.stdout and not (tmp_path / "states.png").exists()
    assert read_json(tmp_path / "results.json")["results"]["length"]["ratio,none"] is None


def test_a_memory_is_measured_by_its_matrices():
    options = ModelOptions(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, layer_pattern=("titans_lmm",),
        titans_lmm=TitansLMMOptions(num_heads=2, head_dim=8, chunk_size=4),
    )  # fmt: skip
    model, cache = RiverrunForCausalLM(RiverrunConfig.from_options(options)).eval(), RiverrunCache(1)
    with torch.no_grad():
        model(torch.arange(7)[None], past_key_values=cache)
    first, second = (cache.layers[0][f"memory_weights_{i}"][0].double() for i in range(2))
    expected = (first.square().sum((1, 2)) + second.square().sum((1, 2))).sqrt()
    np.testing.assert_allclose(state_statistics.head_norms(cache.layers[0]), expected.numpy())
