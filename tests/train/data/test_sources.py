"""Reading documents: formats, pieces, and input that cannot be used."""

import bz2
import gzip
import json
import lzma
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from riverrun.train.data.sources import Skipped, draw_documents, find_files, open_source

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def documents(source):
    return [text for piece in range(len(source.sizes)) for text in source.documents(piece)]


def texts(source):
    return [text for text in documents(source) if not isinstance(text, Skipped)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_folders_and_patterns(tmp_path):
    for name in ("b.py", "a.py", "sub/c.py", "sub/d.txt", ".hidden/e.py", ".f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = lambda *args: [path.name for path in find_files(*args)]  # noqa: E731
    assert names([tmp_path], "*.py") == ["a.py", "b.py", "c.py"]
    assert names([tmp_path]) == ["a.py", "b.py", "c.py", "d.txt"]
    assert names([f"{tmp_path}/*.py"]) == ["a.py", "b.py"]
    assert names([f"{tmp_path}/**/*.txt"]) == ["d.txt"]
    assert names([tmp_path / "b.py", tmp_path], "*.py") == ["b.py", "a.py", "c.py"]  # each once
    for inputs, glob, message in (
        ([tmp_path / "none"], "*", "no file, folder or pattern .*none"),
        ([tmp_path], "*.rs", r"no files named \*\.rs"),
        ([], "*", "no input"),
    ):
        with pytest.raises(ValueError, match=message):
            find_files(inputs, glob)


def test_text_is_read_as_it_is(tmp_path):
    contents = ["one\r\ntwo\r", "\ufefftab\t", "é\n"]
    for i, text in enumerate(contents):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "3.txt").write_bytes(b"")
    (tmp_path / "4.txt").write_bytes(b"caf\xe9")
    found = documents(open_source([tmp_path]))
    assert found[:3] == contents
    assert found[3:] == [
        Skipped("empty", str(tmp_path / "3.txt")),
        Skipped("not UTF-8", f"{tmp_path / '4.txt'} (byte 3)"),
    ]


@pytest.mark.parametrize("piece_bytes", [1, 10, 25, 10**6])
def test_pieces_cover_text_files_in_order(tmp_path, piece_bytes):
    for i in range(20):
        (tmp_path / f"{i:02d}").write_text("x" * i + f" {i}")
    source = open_source([tmp_path], piece_bytes=piece_bytes)
    assert texts(source) == ["x" * i + f" {i}" for i in range(20)]
    assert sum(source.sizes) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert len(source.sizes) == {1: 20, 10**6: 1}.get(piece_bytes, len(source.sizes))
    assert documents(pickle.loads(pickle.dumps(source))) == documents(source)


@pytest.mark.parametrize("piece_bytes", [None, 100])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "parquet"])
def test_rows(tmp_path, kind, piece_bytes):
    rows = [{"id": i, "body": f"row {i}\n\t é"} for i in range(700)]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    source = open_source([path], field="body", cache=tmp_path / "cache", piece_bytes=piece_bytes)
    assert texts(source) == [row["body"] for row in rows]
    whole = piece_bytes is None or path.suffix in COMPRESS  # a compressed file can only be read from its beginning
    assert len(source.sizes) == 1 if whole else len(source.sizes) > 50
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)


def test_a_folder_in_hub_layout(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": [f"{split} {i}" for i in range(3)]}), tmp_path / "data" / f"{split}-0.parquet")
    found = [texts(open_source([str(tmp_path)], format="hub", split=split)) for split in ("train", "test")]
    assert found == [["train 0", "train 1", "train 2"], ["test 0", "test 1", "test 2"]]
    with pytest.raises(ValueError, match="cannot read"):
        open_source([str(tmp_path)], format="hub", split="valid")
    with pytest.raises(ValueError, match="one hub name"):
        open_source(["a/b", "c/d"], format="hub")


def test_rows_without_text_are_reported(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "yes"}, {"text": ""}, {"text": None}, {"other": 1}])
    found = documents(open_source([path], cache=tmp_path / "cache"))
    assert found[0] == "yes"
    assert [(s.reason, s.where.rpartition("(")[2]) for s in found[1:]] == [
        ("empty", "line 2)"),
        ("no text", "line 3)"),
        ("no text", "line 4)"),
    ]


@pytest.mark.parametrize("piece_bytes", range(1, 60))
def test_a_line_belongs_to_one_piece_wherever_the_cuts_fall(tmp_path, piece_bytes):
    lines = [
        '{"text": "a"}',
        "",
        '{"text": "é\\n"}\r',
        '{"text": null}',
        '{"text": "漢"}',
        '{"text": "' + "x" * 70 + '"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())  # the last line is not closed
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"{i}"} for i in range(5)])
    source = open_source([tmp_path], piece_bytes=piece_bytes)
    assert documents(source) == [
        "a", "é\n", Skipped("no text", f"{tmp_path / 'a.jsonl'} (line 4)"), "漢", "x" * 70, *"01234",
    ]  # fmt: skip


def test_other_fields_may_vary(tmp_path):
    """From line to line, also far apart, and from file to file."""
    rows = [{"text": f"{i} " * 300} for i in range(20_000)]  # 36 MB: several blocks of any reader
    rows[0]["meta"] = None
    rows[-2] |= {"meta": {"n": 1}, "more": [1, "a", None]}
    rows[-1] |= {"meta": "text"}
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{"id": 3, "text": "last"}])
    assert texts(open_source([tmp_path])) == [row["text"] for row in rows] + ["last"]
    for name, columns in (("a", {"text": ["one"], "n": [1]}), ("b", {"n": ["x"], "text": ["two"], "m": [[1]]})):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    assert texts(open_source([tmp_path], glob="*.parquet", cache=tmp_path / "cache")) == ["one", "two"]


def test_invalid_unicode_in_json_lines_is_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "bad \xff"}\n{"text": "half a pair \\ud800"}\n{"text": "fine"}\n')
    assert documents(open_source([path])) == [
        "good",
        Skipped("not UTF-8", f"{path} (line 2)"),
        Skipped("not UTF-8", f"{path} (line 3)"),
        "fine",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"line 302\): not JSON .*one JSON object"),
        ('["text"]', r"line 302\): a JSON list and not an object"),
        ('{"text": 5}', r"'text' of .*line 302\) holds int, not text"),
    ],
)
def test_a_bad_line_is_named_from_any_piece(tmp_path, line, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(301)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl \({message}" if "holds" not in message else message):
        documents(open_source([path], piece_bytes=100))


def test_invalid_unicode_in_parquet_is_reported(tmp_path):
    column = pa.array([b"good", b"bad \xff", b"fine"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = documents(open_source([tmp_path / "a.parquet"], cache=tmp_path / "cache"))
    assert [getattr(text, "reason", text) for text in found] == ["good", "not UTF-8", "fine"]


def test_unusable_rows_are_explained(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [{"body": "x", "n": 1}])
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="has no field 'text': choose one with --field out of body, n"):
        open_source([good], cache=cache)
    with pytest.raises(ValueError, match=r"'n' of .*good\.jsonl \(line 1\) holds int, not text"):
        open_source([good], field="n", cache=cache)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"cannot read .*bad\.jsonl"):
        documents(open_source([bad]))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"cannot read .*cut\.parquet"):
        open_source([tmp_path / "cut.parquet"], cache=cache)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "one.parquet")
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"two\.parquet has no field 'text': .* out of body, n"):
        open_source([tmp_path / "one.parquet", tmp_path / "two.parquet"], cache=cache)
    with pytest.raises(ValueError, match=r"'n' of .*two\.parquet holds int64, not text"):
        open_source([tmp_path / "two.parquet"], field="n", cache=cache)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*cut\.jsonl\.gz"):
        documents(open_source([tmp_path / "cut.jsonl.gz"]))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="no data"):
        open_source([tmp_path / "empty.jsonl"], cache=cache)
    (tmp_path / "note.txt").write_text("text")
    with pytest.raises(ValueError, match=r"several formats: jsonl \(.*good\.jsonl\), text \(.*note\.txt\)"):
        open_source([good, tmp_path / "note.txt"], cache=cache)
    with pytest.raises(ValueError, match="none of auto, text"):
        open_source([good], format="csv")


def test_files_that_change_or_vanish_are_noticed(tmp_path):
    for name in ("a", "b", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "text"}')
    for source, name in (
        (open_source([tmp_path / "a", tmp_path / "b"]), "a"),
        (open_source([tmp_path / "c.jsonl"]), "c.jsonl"),
    ):
        (tmp_path / name).write_text('{"text": "longer text"}')
        with pytest.raises(ValueError, match=f"{name} changed while"):
            documents(source)
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=rf"cannot read .*{name}: No such file"):
            documents(source)


def test_documents_are_drawn_by_content(tmp_path):
    for i in range(400):
        (tmp_path / f"{i:03d}").write_text(f"{i:04d}" * 5)
    source = open_source([tmp_path], piece_bytes=500)
    drawn = list(draw_documents(source, 2000))
    assert 60 <= len(drawn) <= 140  # a quarter is 100, the standard deviation 9
    assert drawn == sorted(drawn) == list(draw_documents(source, 2000))
    assert list(draw_documents(source, 10**6)) == texts(source)
