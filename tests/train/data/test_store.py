"""The token store: what is written is read back, and damage is named and refused."""

import json

import numpy as np
import pytest

from riverrun.train.data import store as stores
from riverrun.train.data.store import TokenStore, token_dtype, write_index, write_shard

TOKENIZER = {"fingerprint": "f" * 64, "vocab_size": 100, "eos_id": 0}
SHARDS = [[[5, 0], [0], [7, 8, 9, 0]], [[1, 2, 0]], [[3, 0], [4, 4, 4, 4, 0]]]


def write(folder, shards=SHARDS, tokenizer=TOKENIZER):
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, documents in enumerate(shards):
        items = ((np.array(d), 10 * len(d)) for d in documents)
        entries.append(write_shard(folder, f"{i:05d}", items, token_dtype(tokenizer["vocab_size"])))
    write_index(folder, entries, tokenizer=tokenizer)
    return folder


def test_documents_and_ranges_across_shards(tmp_path):
    store = TokenStore.open(write(tmp_path), verify=True)
    documents = [d for shard in SHARDS for d in shard]
    flat = np.concatenate(documents)
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (6, len(flat), 10 * len(flat))
    assert [store.document(i).tolist() for i in range(6)] == documents
    assert [store.document_bytes(i) for i in range(6)] == [10 * len(d) for d in documents]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    for start in range(len(flat)):
        for stop in range(start + 1, len(flat) + 1):
            assert store.tokens(start, stop).tolist() == flat[start:stop].tolist()
            expected = starts[(starts >= start) & (starts < stop)]
            assert store.document_starts(start, stop).tolist() == expected.tolist()


def test_more_shards_than_are_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MAPPED_SHARDS", 2)
    shards = [[[i + 1, 0], [i + 1, i + 1, 0]] for i in range(20)]
    store = TokenStore.open(write(tmp_path, shards))
    for i in (39, 0, 17, 17, 4, 38):
        assert store.document(i).tolist() == shards[i // 2][i % 2]
    assert store.tokens(0, store.num_tokens).tolist() == [t for shard in shards for d in shard for t in d]
    assert len(store.document_starts(0, store.num_tokens)) == 40
    assert store._map.cache_info().currsize == 2


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    store = TokenStore.open(write(tmp_path, [[[70_000, 0]]], {**TOKENIZER, "vocab_size": 80_000}))
    assert store.document(0).tolist() == [70_000, 0]


@pytest.mark.parametrize("name", ["00000.tokens", "00001.docs", "00002.tokens"])
def test_truncated_files_are_named(tmp_path, name):
    path = write(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name} has .* bytes instead of"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize("name", ["00000.tokens", "00001.docs", "00002.tokens"])
def test_any_flipped_byte_is_named(tmp_path, name):
    path = write(tmp_path) / name
    data = path.read_bytes()
    for offset in range(len(data)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(ValueError, match=f"{name} was altered"):
            TokenStore.open(tmp_path, verify=True)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        TokenStore.open(tmp_path)


def test_a_folder_without_index_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="not a token store"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize("damage", range(9))
def test_malformed_indices_are_refused(tmp_path, damage):
    path = write(tmp_path) / "index.json"
    index = json.loads(path.read_text())
    texts = [
        path.read_text()[:-5],
        "[]",
        json.dumps({**index, "version": 99}),
        json.dumps({**index, "dtype": "float32"}),
        json.dumps({**index, "shards": [{"name": "00000"}]}),
        json.dumps({**index, "shards": [{**index["shards"][0], "name": "../00000"}]}),
        json.dumps({**index, "tokenizer": {"fingerprint": "x"}}),
        json.dumps({**index, "shards": [{**index["shards"][0], "tokens": "9"}]}),
        json.dumps({**index, "shards": [{**index["shards"][0], "tokens": 0}]}),
    ]
    path.write_text(texts[damage])
    with pytest.raises(ValueError, match=r"index\.json is not an index"):
        TokenStore.open(tmp_path)


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no documents"):
        TokenStore.open(write(tmp_path, [[]]))
