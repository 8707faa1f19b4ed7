"""Preparing a corpus: complete, split by document, the same bytes for any number of workers, resumed after a kill."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import riverrun
from riverrun.train.data import prepare as module
from riverrun.train.data import store as stores
from riverrun.train.data.prepare import WORK, prepare
from riverrun.train.data.store import TokenStore
from riverrun.train.data.tokenizer import ByteTokenizer, load_tokenizer

ROOT = Path(riverrun.__file__).parent.parent
PIECES = {"piece_bytes": 300, "held_out": 0.2, "seed": 3}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i}\n" * (i % 7 + 1) if i != 20 else "")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


def contents(folder):
    """The digest of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(store):
    tokenizer = ByteTokenizer()
    found = []
    for i in range(store.num_documents):
        *ids, last = store.document(i).tolist()
        assert last == tokenizer.eos_id
        found.append(tokenizer.decode(ids))
        assert store.document_bytes(i) == len(found[-1].encode())
    return found


def test_every_document_is_in_one_store(corpus, tmp_path):
    result = prepare([corpus], tmp_path / "out", tokenizer="bytes", **PIECES)
    train, held_out = (TokenStore.open(path, verify=True) for path in (result.train, result.held_out))
    texts = [path.read_text() for path in sorted(corpus.glob("[0-9]*.txt")) if path.stat().st_size]
    assert sorted(read(train) + read(held_out)) == sorted(texts)
    assert [text for text in texts if text in read(train)] == read(train)  # in order
    assert 2 <= held_out.num_documents <= 16
    assert len(train.shards) > 5
    assert result.skipped == {"empty": 1, "not UTF-8": 1}
    assert result.examples == [f"{corpus / 'latin.txt'} (byte 3): not UTF-8"]
    assert result.counts["train"] == {
        "documents": train.num_documents,
        "tokens": train.num_tokens,
        "bytes": train.num_bytes,
    }
    assert load_tokenizer(result.tokenizer).fingerprint == train.tokenizer_fingerprint
    assert not (tmp_path / "out" / WORK).exists()


def test_copies_stay_on_one_side_and_the_seed_decides(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(60):
        (tmp_path / "corpus" / f"{i:02d}").write_text(f"text {i % 30}")
    sides = []
    for seed in (0, 1):
        result = prepare([tmp_path / "corpus"], tmp_path / f"{seed}", tokenizer="bytes", held_out=0.5, seed=seed)
        train, held_out = (set(read(TokenStore.open(path))) for path in (result.train, result.held_out))
        assert not train & held_out
        sides.append(train)
    assert sides[0] != sides[1]


def test_without_held_out_there_is_one_store(corpus, tmp_path):
    result = prepare([corpus], tmp_path / "out", tokenizer="bytes")
    assert result.held_out is None and not (tmp_path / "out" / "held_out").exists()
    assert TokenStore.open(result.train).num_documents == 39


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_workers_do_not_change_a_byte(corpus, tmp_path, kind):
    inputs = [corpus]
    if kind != "text":
        from datasets import Dataset

        rows = Dataset.from_dict({"text": [f"row {i} " * (i % 9) for i in range(300)]})
        inputs = [tmp_path / f"rows.{kind}"]
        getattr(rows, {"jsonl": "to_json", "parquet": "to_parquet"}[kind])(inputs[0])
    found = []
    for workers in (1, 3) if kind == "text" else (1, 2):
        prepare(inputs, tmp_path / f"{workers}", tokenizer="bytes", workers=workers, **PIECES)
        found.append(contents(tmp_path / f"{workers}"))
    assert len(found[0]) > 30
    assert found[0] == found[1]


SLOW = """
import sys, time
from riverrun.train.data.prepare import prepare
from riverrun.train.data.tokenizer import ByteTokenizer

class SlowTokenizer(ByteTokenizer):
    def encode(self, text):
        time.sleep(0.1)
        return super().encode(text)

def main():
    corpus, out, workers = sys.argv[1:]
    prepare([corpus], out, tokenizer=SlowTokenizer(), workers=int(workers), piece_bytes=300, held_out=0.2, seed=3)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(corpus, tmp_path, workers, monkeypatch):
    prepare([corpus], tmp_path / "whole", tokenizer="bytes", **PIECES)
    out = tmp_path / "out"
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), str(corpus), str(out), str(workers)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while len(list((out / WORK).glob("0*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name in ("train", "held_out"):
        with pytest.raises(ValueError, match="not a token store"):
            TokenStore.open(out / name)
    done = {p.name for p in (out / WORK).glob("0*.json")}

    written = []
    write = module.PieceWriter.write
    monkeypatch.setattr(module.PieceWriter, "write", lambda self, piece: (written.append(piece), write(self, piece)))
    prepare([corpus], out, tokenizer="bytes", **PIECES)
    assert written and not {f"{piece:05d}.json" for piece in written} & done
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["tokens", "docs"])
def test_a_shard_torn_after_its_record_is_written_again(corpus, tmp_path, kind, monkeypatch):
    prepare([corpus], tmp_path / "whole", tokenizer="bytes", **PIECES)
    out = tmp_path / "out"
    monkeypatch.setattr(module, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], out, tokenizer="bytes", **PIECES)
    monkeypatch.undo()
    shard = out / "train" / f"00002.{kind}"
    shard.write_bytes(shard.read_bytes()[:-1])
    prepare([corpus], out, tokenizer="bytes", **PIECES)
    assert contents(out) == contents(tmp_path / "whole")


def stop(*_):
    raise KeyboardInterrupt


def test_a_finished_folder_is_left_alone(corpus, tmp_path):
    first = prepare([corpus], tmp_path / "out", tokenizer="bytes", **PIECES)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert prepare([corpus], tmp_path / "out", tokenizer="bytes", **PIECES) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_options_or_input_are_refused(corpus, tmp_path, finished, monkeypatch):
    out = tmp_path / "out"
    if not finished:
        monkeypatch.setattr(module, "_finish", stop)
    try:
        prepare([corpus], out, tokenizer="bytes", **PIECES)
    except KeyboardInterrupt:
        assert not finished
    monkeypatch.undo()
    before = contents(out)

    class Other(ByteTokenizer):
        fingerprint = "0" * 64

    for change, message in (
        ({"held_out": 0.3}, r"held_out was 0\.2, now 0\.3"),
        ({"seed": 4}, "seed was 3, now 4"),
        ({"tokenizer": Other()}, "tokenizer was .*, now 000000000000"),
        ({"piece_bytes": 1000}, "pieces instead of"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([corpus], out, **{"tokenizer": "bytes", **PIECES, **change})
    (corpus / "05.txt").write_text("document 5!\n" * 6)
    with pytest.raises(ValueError, match="the input files changed"):
        prepare([corpus], out, tokenizer="bytes", **PIECES)
    assert contents(out) == before


def test_a_full_disk_is_explained_and_resumed(corpus, tmp_path, monkeypatch):
    prepare([corpus], tmp_path / "whole", tokenizer="bytes", **PIECES)
    out, sync, calls = tmp_path / "out", os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(stores.os, "fsync", full)
    with pytest.raises(ValueError, match=r"disk is full: .*out is incomplete"):
        prepare([corpus], out, tokenizer="bytes", **PIECES)
    monkeypatch.undo()
    assert len(list((out / WORK).glob("0*.json"))) >= 2
    with pytest.raises(ValueError, match="not a token store"):
        TokenStore.open(out / "train")
    prepare([corpus], out, tokenizer="bytes", **PIECES)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_disk_that_is_full_from_the_start(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores.os, "fsync", full)
    with pytest.raises(ValueError, match="give the same command again"):
        prepare([corpus], out, tokenizer="bytes", **PIECES)
    monkeypatch.undo()
    assert prepare([corpus], out, tokenizer="bytes", **PIECES).counts["train"]["documents"]


def test_corpora_without_documents_are_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "empty").write_text("")
    (tmp_path / "corpus" / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"no usable documents; 1 empty; 1 not UTF-8\n.*latin \(byte 0\)"):
        prepare([tmp_path / "corpus"], tmp_path / "out", tokenizer="bytes", held_out=0.1)
    (tmp_path / "corpus" / "text").write_text("text")
    with pytest.raises(ValueError, match="no document fell into held_out"):
        prepare([tmp_path / "corpus"], tmp_path / "out", tokenizer="bytes", held_out=1e-9)
    with pytest.raises(ValueError, match="no document fell into train"):
        prepare([tmp_path / "corpus"], tmp_path / "out", tokenizer="bytes", held_out=1 - 1e-9)
    result = prepare([tmp_path / "corpus"], tmp_path / "out", tokenizer="bytes")  # the folder is free for other options
    assert TokenStore.open(result.train).num_documents == 1


def test_wrong_calls_leave_no_trace(corpus, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        ({"tokenizer": "./none"}, "does not exist"),
        ({"held_out": 1.0}, "below 1"),
        ({"workers": 0}, "at least one worker"),
        ({"glob": "*.rs"}, "no files named"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([corpus], out, **{"tokenizer": "bytes", **options})
        assert not out.exists()
    out.write_text("a file")
    with pytest.raises(ValueError, match="is a file"):
        prepare([corpus], out, tokenizer="bytes")
    with pytest.raises(ValueError, match="is not empty"):
        prepare([corpus], corpus, tokenizer="bytes")


def test_two_runs_do_not_write_one_folder(corpus, tmp_path):
    work = tmp_path / "out" / WORK
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is preparing"):
            prepare([corpus], tmp_path / "out", tokenizer="bytes")
    prepare([corpus], tmp_path / "out", tokenizer="bytes")


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_damaged_reports_are_named(corpus, tmp_path, damage):
    prepare([corpus], tmp_path / "out", tokenizer="bytes")
    (tmp_path / "out" / "prepare.json").write_text(damage)
    with pytest.raises(ValueError, match=r"prepare\.json is damaged"):
        prepare([corpus], tmp_path / "out", tokenizer="bytes")


def test_errors_in_workers_reach_the_user(corpus, tmp_path):
    """A file that vanishes after the plan was made."""
    source = module.open_source([corpus], piece_bytes=300)
    (corpus / "39.txt").unlink()
    out = tmp_path / "out"
    for folder in ("train", "held_out", WORK):
        (out / folder).mkdir(parents=True)
    writer = module.PieceWriter(source, ByteTokenizer(), out, 0.2, 0)
    with pytest.raises(ValueError, match=r"cannot read .*39\.txt"):
        list(module._write_all(writer, list(range(len(source.sizes))), 2))


def test_index_holds_no_paths(corpus, tmp_path):
    result = prepare([corpus], tmp_path / "out", tokenizer="bytes", **PIECES)
    index = json.loads((result.train / "index.json").read_text())
    assert str(tmp_path) not in json.dumps(index)
