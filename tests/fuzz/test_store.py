"""Token stores that are damaged or meant ill: told of by name, and nothing is read or allocated that is not there."""

import hashlib
import json
import random

import numpy as np
import pytest
from typer.testing import CliRunner

from riverrun.launch.cli import app
from riverrun.train.data.packing import PackedRows
from riverrun.train.data.store import TokenStore, token_dtype, write_index, write_shard
from tests.fuzz.mutations import altered_json, damaged, runs

VOCAB, SHARDS = 300, 3
TOKENIZER = {"fingerprint": "f" * 64, "vocab_size": VOCAB, "eos_id": 0}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    entries = []
    for s in range(SHARDS):
        lengths = rng.integers(1, 30, size=12)
        documents = [(rng.integers(1, VOCAB, size=n), 3 * int(n)) for n in lengths]
        entries.append(write_shard(tmp_path, f"{s:05d}", documents, token_dtype(VOCAB)))
    write_index(tmp_path, entries, tokenizer=TOKENIZER)
    return tmp_path


def read_all(store):
    """Everything that training reads of a store lies within it."""
    text = store.tokens(0, store.num_tokens)
    assert len(text) == store.num_tokens
    starts = store.document_starts(0, store.num_tokens)
    assert len(starts) == store.num_documents and starts[0] == 0
    assert (np.diff(starts) > 0).all() and starts[-1] < store.num_tokens
    ends = np.append(starts[1:], store.num_tokens)
    for i, (start, end) in enumerate(zip(starts, ends)):
        assert np.array_equal(store.document(i), text[start:end])
        assert store.document_bytes(i) >= 0
    rows = PackedRows(store, 16)
    for i in range(len(rows)):
        rows[i]


def test_damaged_indexes(folder):
    rng, path = random.Random(0), folder / "index.json"
    value = json.loads(path.read_bytes())
    held = sum(file.stat().st_size for file in folder.glob("*.tokens"))
    largest = max(file.stat().st_size for file in folder.glob("*.tokens"))
    accepted = 0
    for _ in range(runs(2000)):
        path.write_bytes(altered_json(rng, value))
        try:
            store = TokenStore.open(folder)
            # a shard may be named more than once: nothing else can be more than there is
            assert store.num_tokens * store._dtype.itemsize <= held + 3 * largest
            read_all(store)
        except ValueError as error:
            assert str(folder) in str(error) and ("prepare" in str(error)), error
        else:
            accepted += 1
    assert accepted > 0


@pytest.mark.parametrize("tokens, documents", [(10**12, 12), (2**62, 12), (10**12, 10**12), (0, 0), (-1, -1), (12, 13)])
def test_absurd_sizes_allocate_nothing(folder, tokens, documents):
    path = folder / "index.json"
    index = json.loads(path.read_bytes())
    index["shards"][1] |= {"tokens": tokens, "documents": documents}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"instead of|was altered"):
        TokenStore.open(folder)


@pytest.mark.parametrize("name", ["", "../00000", "/etc/passwd", "a/b", "..", "a\0b", "x" * 300, "\x1b[2J"])
def test_a_shard_lies_in_its_folder(folder, name):
    path = folder / "index.json"
    index = json.loads(path.read_bytes())
    index["shards"][1]["name"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="prepare the corpus again"):
        TokenStore.open(folder)


@pytest.mark.parametrize("content", [b"[" * 10**6, b"1" * 5000, b"", b"\xff" * 9, b"null", b"{}"])
def test_what_is_no_index(folder, content):
    (folder / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not an index"):
        TokenStore.open(folder)


def test_documents_that_lie_where_they_cannot(folder):
    """The sizes are right, so that only the numbers in the file are wrong; a checksum is as easily altered as they."""
    rng, path = random.Random(0), folder / "00001.docs"
    content = path.read_bytes()
    index = json.loads((folder / "index.json").read_bytes())
    accepted = 0
    for round_ in range(runs(2000)):
        numbers = np.frombuffer(content, "<i8").copy()
        if round_ % 2:
            numbers[rng.randrange(len(numbers))] = rng.choice([0, -1, 1, 2**63 - 1, -(2**63), rng.randrange(400)])
            fresh = numbers.tobytes()
        else:
            fresh = damaged(rng, content)[: len(content)].ljust(len(content), b"\0")
        path.write_bytes(fresh)
        try:
            read_all(TokenStore.open(folder))
        except ValueError as error:
            assert str(folder / "00001.docs") in str(error) and "prepare" in str(error)
        else:
            accepted += 1
    assert accepted < runs(2000) / 2

    index["shards"][1]["sha256"]["docs"] = hashlib.sha256(fresh).hexdigest()
    numbers = np.frombuffer(content, "<i8").copy()
    numbers[0] = 10**6
    path.write_bytes(numbers.tobytes())
    index["shards"][1]["sha256"]["docs"] = hashlib.sha256(numbers.tobytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"00001\.docs does not divide"):
        TokenStore.open(folder, verify=True)


def test_every_flipped_bit_is_found(folder):
    """At 50 places spread over the shards' tokens."""
    rng, files = random.Random(0), sorted(folder.glob("*.tokens"))
    TokenStore.open(folder, verify=True)
    for _ in range(50):
        file = rng.choice(files)
        whole = file.read_bytes()
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        TokenStore.open(folder)  # sizes alone do not tell
        with pytest.raises(ValueError) as raised:
            TokenStore.open(folder, verify=True)
        assert f"{file} was altered" in str(raised.value) and "restore it from a copy" in str(raised.value)
        file.write_bytes(whole)
    file.write_bytes(data)
    done = CliRunner().invoke(app, ["data", "inspect", str(folder)])
    assert done.exit_code == 2 and f"{file} was altered" in done.output.replace("\n", "")


def test_a_token_beyond_the_vocabulary_is_found(folder):
    """A lookup of it would be out of bounds on a GPU."""
    file = folder / "00002.tokens"
    tokens = np.fromfile(file, "<u2")
    tokens[5] = VOCAB
    tokens.tofile(file)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][2]["sha256"]["tokens"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"00002\.tokens has token 300, which its tokenizer of 300 tokens does not have"
    ):
        TokenStore.open(folder, verify=True)


def test_a_shard_that_shrinks_after_the_store_was_opened(folder):
    store = TokenStore.open(folder)
    file = folder / "00000.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"00000\.tokens and \.docs cannot be read"):
        store.tokens(0, 5)
