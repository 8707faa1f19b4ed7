"""The training order: every row once an epoch, the same for any number of ranks, known at any step."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from riverrun.train.data.loader import PackedLoader
from riverrun.train.data.mixture import Mixture, _pattern
from riverrun.train.data.order import Permutation
from riverrun.train.data.packing import IGNORED, PackedRows, collate
from riverrun.train.data.store import TokenStore, token_dtype, write_index, write_shard


@pytest.fixture
def store(tmp_path):
    """Documents of 1 to 12 tokens that count upwards, so that a token tells its place in the corpus."""
    rng = np.random.default_rng(0)
    documents, token = [], 1
    for _ in range(120):
        length = int(rng.integers(0, 12))
        documents.append(np.array([*range(token, token + length), 0]))
        token += length
    entries = []
    for i in range(3):
        items = ((d, len(d)) for d in documents[i * 40 : i * 40 + 40])
        entries.append(write_shard(tmp_path, str(i), items, token_dtype(1000)))
    write_index(tmp_path, entries, tokenizer={"fingerprint": "x", "vocab_size": 1000, "eos_id": 0})
    return TokenStore.open(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutation_is_a_bijection(size):
    images = [Permutation(size, 7, 1)(i) for i in range(size)]
    assert sorted(images) == list(range(size))
    if size >= 16:
        assert images != list(range(size))
        assert images != [Permutation(size, 8, 1)(i) for i in range(size)]


def test_permutation_of_a_huge_range_is_cheap():
    permutation = Permutation(10**15, 3)
    assert len({permutation(i) for i in range(100)}) == 100


def test_rows_cover_the_corpus_and_mask_across_documents(store):
    seq_len = 7
    rows = PackedRows(store, seq_len)
    corpus = store.tokens(0, store.num_tokens)
    starts = set(store.document_starts(0, store.num_tokens).tolist())
    assert len(rows) == (store.num_tokens - 1) // seq_len
    for i in range(len(rows)):
        row = rows[i]
        assert row.input_ids.tolist() == corpus[i * seq_len : (i + 1) * seq_len].tolist()
        for p in range(seq_len):
            place = i * seq_len + p
            assert row.targets[p] == (IGNORED if place + 1 in starts else corpus[place + 1])
            assert (p in row.starts) == (place in starts and p > 0)


def test_batches_bound_documents_and_rows(store):
    rows = PackedRows(store, 7)
    batch = collate([rows[3], rows[9]])
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == 14 and 7 in bounds
    assert bounds == sorted(set(bounds))
    assert batch.cu_seqlens.dtype == torch.int32 and batch.input_ids.dtype == torch.int64
    assert batch.num_targets == (batch.targets != IGNORED).sum()
    flat = batch.input_ids.flatten()
    for b in bounds[1:-1]:
        assert flat[b - 1] == 0 or b == 7  # a document ends before every bound


def test_an_epoch_sees_every_row_once_then_in_another_order(store):
    rows = PackedRows(store, 7)
    mixture = Mixture([rows], [1.0], seed=5)
    n = len(rows)
    first = [mixture.locate(i)[1] for i in range(n)]
    second = [mixture.locate(n + i)[1] for i in range(n)]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second and first != list(range(n))
    assert mixture.epochs(n) == [1.0]


def test_mixture_keeps_its_proportions_everywhere(store):
    short, long = PackedRows(store, 50), PackedRows(store, 7)
    mixture = Mixture([short, long, long], [0.5, 0.3, 0.2], seed=1)
    located = [mixture.locate(i) for i in range(400)]
    for stop in range(1, 401):
        counts = Counter(source for source, _ in located[:stop])
        for source, share in enumerate([0.5, 0.3, 0.2]):
            assert abs(counts[source] - share * stop) <= 1
    for source, rows in enumerate([short, long, long]):
        mine = [row for s, row in located if s == source]
        assert sorted(mine[: len(rows)]) == list(range(min(len(rows), len(mine))))[: len(mine)] or len(mine) < len(rows)
        assert len(set(mine[: len(rows)])) == min(len(rows), len(mine))


def test_no_store_is_ever_a_row_away_from_its_share():
    weights = [0.5, 0.21, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01]
    pattern = _pattern(weights)
    assert Counter(pattern) == {source: round(len(pattern) * weight) for source, weight in enumerate(weights)}
    for stop in range(1, len(pattern) + 1):
        counts = Counter(pattern[:stop])
        assert all(abs(counts[source] - weight * stop) < 1 for source, weight in enumerate(weights))


def test_a_vanishing_weight_is_refused(store):
    rows = PackedRows(store, 7)
    with pytest.raises(ValueError, match="less than 1/1000"):
        Mixture([rows, rows], [1.0, 1e-6], seed=0)


def together(rows, numbers, step):
    batch = collate(rows)
    return replace(batch, extra={"number": torch.tensor(numbers), "step": torch.full((len(rows),), step)})


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_order_does_not_depend_on_ranks_or_micro_batches(store, ranks, micro):
    mixture = Mixture([PackedRows(store, 7)], [1.0], seed=2)
    whole = PackedLoader(mixture, together, global_batch_size=8, micro_batch_size=8)
    loaders = [
        PackedLoader(
            Mixture([PackedRows(store, 7)], [1.0], seed=2), together,
            global_batch_size=8, micro_batch_size=micro, dp_rank=r, dp_size=ranks,
        )
        for r in range(ranks)
    ]  # fmt: skip
    for step in (0, 1, 30, 7):  # any step, in any order: resuming needs nothing but the number
        (expected,) = whole.step(step)
        parts = [batch for loader in loaders for batch in loader.step(step)]
        assert len(parts) == 8 // micro
        assert torch.equal(torch.cat([p.input_ids for p in parts]), expected.input_ids)
        assert torch.equal(torch.cat([p.targets for p in parts]), expected.targets)
        assert sum(p.num_targets for p in parts) == expected.num_targets
        assert torch.cat([p.extra["number"] for p in parts]).tolist() == [*range(8 * step, 8 * step + 8)]
        assert all((p.extra["step"] == step).all() for p in parts)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 2), (4, 1)])
def test_all_ranks_together_see_every_row_once_an_epoch(store, ranks, micro):
    rows = PackedRows(store, 7)
    n = len(rows)
    loaders = [
        PackedLoader(
            Mixture([rows], [1.0], 9), together, global_batch_size=4, micro_batch_size=micro, dp_rank=r, dp_size=ranks
        )
        for r in range(ranks)
    ]
    seen = torch.cat([b.input_ids for step in range(n) for loader in loaders for b in loader.step(step)])
    corpus = store.tokens(0, n * 7).astype(np.int64).reshape(n, 7)
    for epoch in range(4):  # n steps of 4 rows; steps may span two epochs
        assert sorted(seen[epoch * n : (epoch + 1) * n].tolist()) == sorted(corpus.tolist())


@pytest.mark.parametrize(("ranks", "micro"), [(2, 2), (4, 1), (8, 4)])
def test_rows_are_dealt_by_the_lengths_of_their_documents(store, ranks, micro):
    def loaders(balance):
        options = {"global_batch_size": 32, "micro_batch_size": micro, "dp_size": ranks, "balance": balance}
        mixture = Mixture([PackedRows(store, 16)], [1.0], 3)
        return [PackedLoader(mixture, together, **options, dp_rank=r) for r in range(ranks)]

    def cost(batch):
        return sum(length**2 for length in batch.cu_seqlens.diff().tolist())

    spreads = []
    for balance in (False, True):
        costs = np.array([[list(map(cost, loader.step(s))) for loader in loaders(balance)] for s in range(8)])
        spreads.append([np.ptp(costs.sum(2), axis=1).mean(), np.ptp(costs, axis=1).mean()])  # of steps, micro batches
    assert (np.array(spreads[1]) < np.array(spreads[0]) / 2).all(), spreads
    for step in (0, 5):  # the same rows, whoever computes them
        rows = [[row for x in loaders(b) for batch in x.step(step) for row in batch.input_ids.tolist()] for b in (0, 1)]
        assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]


def test_pairs_are_those_of_the_batch(store):
    mixture = Mixture([PackedRows(store, 9), PackedRows(store, 30)], [0.5, 0.5], seed=4)
    for i in range(40):
        assert mixture.pairs(i) == sum(n**2 for n in collate([mixture[i]]).cu_seqlens.diff().tolist())


def test_impossible_splits_and_short_stores_are_refused(store):
    rows = PackedRows(store, 7)
    with pytest.raises(ValueError, match="does not divide into micro batches of 3"):
        PackedLoader(Mixture([rows], [1.0], seed=0), together, global_batch_size=8, micro_batch_size=3)
    with pytest.raises(ValueError, match="less than one row"):
        PackedRows(store, 10_000)
