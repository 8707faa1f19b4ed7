"""Perplexity against plain loops over documents with full logits."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from eval_examples import TEXTS, encoded, exact_hybrid, hybrid, write_store
from torch import nn
from torch.nn import functional as F

from riverrun.eval.batches import packed_batches, row_batches, segments
from riverrun.eval.documents import open_documents
from riverrun.eval.losses import token_losses
from riverrun.eval.models import load_model
from riverrun.eval.tasks import perplexity as task
from riverrun.eval.tasks.perplexity import Tally, evaluate, evaluate_streaming
from riverrun.train.data.packing import PackedRows, collate
from riverrun.train.data.store import TokenStore

V = 258


@torch.no_grad()
def plain_losses(model, documents, seq_len=10**9) -> list[tuple[int, int, float]]:
    """(document, position, loss) of every prediction: a forward pass a segment, all logits at once."""
    found = []
    for number, document in enumerate(documents):
        for start in range(0, len(document) - 1, seq_len):
            tokens = torch.tensor([document[start : start + seq_len + 1]])
            losses = F.cross_entropy(model(tokens[:, :-1]).logits[0].double(), tokens[0, 1:], reduction="none")
            found += [(number, position, loss) for position, loss in enumerate(losses.tolist(), 1)]
    return found


def assert_same(result, losses, tolerance=1e-9):
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(np.mean([loss for *_, loss in losses]), rel=tolerance)
    assert result.documents == len({document for document, *_ in losses})
    for bucket in result.by_position:
        inside = [loss for _, position, loss in losses if bucket.first <= position <= bucket.last]
        assert bucket.tokens == len(inside)
        assert bucket.loss == pytest.approx(np.mean(inside), rel=tolerance)
    assert sum(bucket.tokens for bucket in result.by_position) == len(losses)


@pytest.mark.parametrize("seq_len", [1, 7, 32, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_documents_equal_a_loop_over_documents(seq_len, batch_size):
    model = exact_hybrid()
    result = evaluate(model, packed_batches(encoded(), seq_len, batch_size))
    assert_same(result, plain_losses(model, encoded(), seq_len))


@pytest.mark.parametrize("seq_len", [7, 1000])
def test_one_segment_a_row_equals_a_loop_over_documents(seq_len):
    model = exact_hybrid()
    assert_same(evaluate(model, row_batches(encoded(), seq_len, 3)), plain_losses(model, encoded(), seq_len))


def test_the_trainers_batches_can_be_evaluated(store):
    model = exact_hybrid()
    rows = PackedRows(TokenStore.open(store), 40)
    batches = [collate([rows[i], rows[i + 1]]) for i in (0, 2)]
    result = evaluate(model, [(b.input_ids, b.targets, b.cu_seqlens) for b in batches])
    expected = sum(model(b.input_ids, targets=b.targets, cu_seqlens=b.cu_seqlens).cross_entropy for b in batches)
    tokens = sum(b.num_targets for b in batches)
    assert result.tokens == tokens and result.loss == pytest.approx(expected.item() / tokens, rel=1e-12)
    assert result.documents == sum(len(b.cu_seqlens) - 1 for b in batches)  # each sequence is taken for a document


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("chunk_len", [1, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_streaming_equals_one_long_forward(window, chunk_len, batch_size):
    model = exact_hybrid(window)
    result = evaluate_streaming(model, encoded(), chunk_len=chunk_len, batch_size=batch_size)
    assert_same(result, plain_losses(model, encoded()))
    assert result.by_position[-1].first == 64  # the longest document has 117 tokens


def test_streaming_needs_constant_memory(monkeypatch):
    """The state after 20 chunks is as large as after 3."""
    sizes = []

    def spy(model, input_ids, targets, cache):
        losses = token_losses(model, input_ids, targets, cache=cache)
        sizes.append(cache.num_bytes())
        return losses

    monkeypatch.setattr(task, "token_losses", spy)
    evaluate_streaming(hybrid(), [np.arange(201) % V], chunk_len=10)
    assert len(sizes) == 20 and len(set(sizes[1:])) == 1


def test_a_uniform_model_has_the_entropy_of_its_vocabulary(saved, store, tmp_path):
    loaded = load_model(saved)
    nn.init.zeros_(loaded.model.lm_head.weight)
    documents = open_documents(store, loaded)
    result, record = task.run(loaded, documents, tmp_path, seq_len=16, batch_size=2, streaming=False)
    assert result.loss == pytest.approx(math.log(V), rel=1e-6)
    assert result.perplexity == pytest.approx(V, rel=1e-5)
    assert all(bucket.loss == pytest.approx(math.log(V), rel=1e-6) for bucket in result.by_position)
    assert result.stderr == pytest.approx(0, abs=1e-6)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    tokens = num_bytes + len(TEXTS)  # an end-of-sequence token a document
    assert record.metrics["bits_per_byte"] == pytest.approx(math.log2(V) * tokens / num_bytes, rel=1e-6)


def test_a_document_of_one_token_scores_nothing(saved, tmp_path):
    loaded = load_model(saved)
    documents = open_documents(write_store(tmp_path / "store", ["", "ab"]), loaded)
    result, _ = task.run(loaded, documents, tmp_path / "out", seq_len=16, batch_size=2, streaming=False)
    assert (result.tokens, result.documents) == (2, 1)


class Planted(nn.Module):
    """Not Riverrun's. At position p (from 1), the loss of the right token is p/100: its logit is the log-odds."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.weight = wanted, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        right = torch.exp(-(torch.arange(input_ids.shape[1], dtype=torch.float64) + 1) / 100)
        logits = torch.zeros(*input_ids.shape, 4, dtype=torch.float64)
        odds = torch.log(right * 3 / (1 - right))
        logits.scatter_(2, self.wanted(input_ids)[..., None], odds.expand(input_ids.shape)[..., None])
        return type("Output", (), {"logits": logits})


def test_the_loss_by_position_is_that_of_a_planted_model():
    document = np.arange(70) % 4
    result = evaluate(Planted(lambda ids: (ids + 1) % 4), row_batches([document, document[:20]], 100, 2))
    spans = [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127)]
    assert [(b.first, b.last) for b in result.by_position] == spans
    for bucket in result.by_position:
        positions = [p for n in (69, 19) for p in range(1, n + 1) if bucket.first <= p <= bucket.last]
        assert bucket.tokens == len(positions)
        assert bucket.loss == pytest.approx(np.mean(positions) / 100, rel=1e-12)


def test_the_standard_error_is_that_of_repeated_draws():
    """Documents of unequal lengths with a mean of their own: the spread of many estimates is the stated error."""
    rng = np.random.default_rng(0)

    def draw():
        tally = Tally()
        for document, length in enumerate(rng.integers(1, 60, 50)):
            losses = rng.normal(3 + length / 60, 1) + rng.normal(0, 0.5, length)
            tally.add(losses, np.arange(1, length + 1), np.full(length, document))
        return tally.result()

    draws = [draw() for _ in range(400)]
    spread = np.std([d.loss for d in draws])
    assert np.mean([d.stderr for d in draws]) == pytest.approx(spread, rel=0.1)
    truth = 3 + (np.arange(1, 60) ** 2).sum() / np.arange(1, 60).sum() / 60
    covered = np.mean([d.interval[0] < truth < d.interval[1] for d in draws])
    assert 0.9 < covered < 0.98


def test_one_document_has_no_standard_error():
    tally = Tally()
    tally.add(np.ones(3), np.arange(1, 4), np.zeros(3, int))
    assert tally.result().stderr is None and tally.result().interval is None


def test_a_batch_without_targets_changes_nothing():
    tally = Tally()
    tally.add(np.zeros(0), np.zeros(0, int), np.zeros(0, int))
    tally.add(np.ones(3), np.arange(1, 4), np.full(3, 7))
    assert tally.result().tokens == 3 and tally.result().documents == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_an_error(bad):
    tally = Tally()
    tally.add(np.array([1.0, bad]), np.array([1, 2]), np.zeros(2, int))
    with pytest.raises(ValueError, match="try fp32"):
        tally.result()


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="fewer than two tokens"):
        evaluate(hybrid(), packed_batches([[1], []], 8, 2))


def test_the_model_stays_in_training_mode():
    model = hybrid().train()
    evaluate(model, packed_batches(encoded(), 8, 2))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_every_token_but_the_first_is_predicted_once():
    pieces = [(number, tokens.tolist()) for number, tokens in segments([[5], list(range(8)), [1, 2]], 3)]
    assert pieces == [(1, [0, 1, 2, 3]), (1, [3, 4, 5, 6]), (1, [6, 7]), (2, [1, 2])]


def test_rows_are_filled_first_fit():
    documents = [[0] * (n + 1) for n in (5, 6, 3, 2, 8)]
    first, second = packed_batches(documents, 8, 2)
    assert first.cu_seqlens.tolist() == [0, 5, 8, 14, 16]  # 5 + 3 and 6 + 2 fill two rows
    assert first.documents.tolist() == [0, 2, 1, 3]
    assert second.cu_seqlens.tolist() == [0, 8] and second.input_ids.shape == (1, 8)


def test_a_foreign_model_is_evaluated_by_rows(foreign, store, tmp_path):
    loaded = load_model(foreign)
    assert not loaded.is_riverrun and loaded.seq_len == 64
    documents = open_documents(store, loaded)
    result, _ = task.run(loaded, documents, tmp_path, seq_len=20, batch_size=2, streaming=False)
    assert_same(result, plain_losses(loaded.model, encoded(), 20), tolerance=1e-5)
    with pytest.raises(ValueError, match="recurrent state"):
        task.run(loaded, documents, tmp_path, seq_len=20, batch_size=2, streaming=True)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        task.run(loaded, documents, tmp_path, seq_len=65, batch_size=2, streaming=False)
    with pytest.raises(ValueError, match="need a Riverrun model"):
        evaluate(loaded.model, packed_batches(encoded(), 8, 2))


def test_texts_equal_the_store_of_the_same_texts(saved, store, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[:2], "", *TEXTS[2:]]))
    loaded = load_model(saved)
    of_store, of_file = (open_documents(p, loaded) for p in (store, path))
    assert (of_file.num_tokens, of_file.num_bytes) == (of_store.num_tokens, of_store.num_bytes)
    assert [list(d) for d in of_file.tokens] == [d.tolist() for d in of_store.tokens] == encoded()
    limited = open_documents(path, loaded, 2)
    assert (limited.num_documents, limited.available, limited.num_bytes) == (2, 5, len(TEXTS[0]) + 1)


def test_a_foreign_models_text_begins_with_its_bos(foreign, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("né")
    documents = open_documents(path, load_model(foreign))
    assert list(documents.tokens) == [[256, *"né".encode(), 257]]
    assert (documents.num_tokens, documents.num_bytes) == (4, 3)  # so that bits per byte are total bits / bytes


def test_wrong_data_is_refused(saved, tmp_path, store):
    loaded = load_model(saved)
    other = write_store(tmp_path / "other", fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"another tokenizer.*prepare it again"):
        open_documents(other, loaded)
    open_documents(other, replace(loaded, tokenizer=None))  # unknown: only the sizes can be compared
    small = replace(loaded, tokenizer=None, model=nn.Module())
    small.model.get_input_embeddings = lambda: nn.Embedding(100, 4)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"vocabulary of 258 tokens.*embeddings for 100"):
        open_documents(store, small)
    with pytest.raises(ValueError, match="has no tokenizer"):
        (tmp_path / "a.txt").write_text("a")
        open_documents(tmp_path / "a.txt", replace(loaded, tokenizer=None))
    with pytest.raises(ValueError, match="there is no"):
        open_documents(tmp_path / "none", loaded)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="holds no text"):
        open_documents(tmp_path / "empty.txt", loaded)
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        open_documents(tmp_path / "latin.txt", loaded)
    with pytest.raises(ValueError, match="limit of 0"):
        open_documents(store, loaded, 0)
