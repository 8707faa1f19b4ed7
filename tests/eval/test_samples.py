"""Samples that one or several ranks share: the same records and the same file, also after kills."""

import pytest

from riverrun.eval.samples import SAMPLES, overwriting
from tests.eval import shared_work
from tests.eval.shared_work import KEYS, squares


@pytest.fixture
def alone(tmp_path):
    """What one process that is never killed finds and writes."""
    records, worked = squares(tmp_path / "alone")
    assert worked == list(range(23)) and records == [{"square": n**2, "third": n / 3} for n in range(23)]
    return records, (tmp_path / "alone" / SAMPLES).read_text()


def test_ranks_find_what_one_process_finds(ranks, tmp_path, alone):
    found = ranks(2).run(squares, tmp_path / "two")
    assert [records for records, _ in found] == [alone[0]] * 2
    assert [worked for _, worked in found] == [list(range(0, 23, 2)), list(range(1, 23, 2))]
    assert (tmp_path / "two" / SAMPLES).read_text() == alone[1]
    assert not list((tmp_path / "two").glob("samples.*.jsonl"))


def test_a_killed_evaluation_goes_on_with_another_number_of_ranks(ranks, tmp_path, alone):
    folder = tmp_path / "killed"
    done = {n for records, worked in ranks(4).run(squares, folder, 1) for n in worked if records is None}
    assert len(done) == 8 and len(list(folder.glob("samples.*.jsonl"))) == 4
    path = folder / "samples.3.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:-5])  # died while writing
    done -= {lines_number(lines[1])}

    found = ranks(2).run(squares, folder, 2)
    assert all(records is None for records, _ in found)
    more = [n for _, worked in found for n in worked]
    assert done == set(range(7)) and sorted(more) == list(range(7, 13))  # two batches each, of the same kind

    records, last = squares(folder)
    assert records == alone[0] and sorted([*done, *more, *last]) == list(range(23))
    assert (folder / SAMPLES).read_text() == alone[1] and not list(folder.glob("samples.*.jsonl"))
    assert all(worked == [] for _, worked in ranks(2).run(squares, folder))  # nothing is left to do


def lines_number(line: str) -> int:
    return next(number for kind, number in KEYS if f'"key": ["{kind}", {number}]' in line)


def test_every_rank_is_told_of_another_configuration(ranks, tmp_path):
    squares(tmp_path)
    told = ranks(2).run(shared_work.refused, tmp_path)
    assert all("another configuration (a differ)" in message and "--overwrite" in message for message in told)


def test_overwriting_starts_again(tmp_path):
    squares(tmp_path)
    (tmp_path / "samples.7.jsonl").write_text('{"key": ["even", 0], "square": 99}\n')
    with overwriting():
        records, worked = squares(tmp_path)
    assert worked == list(range(23)) and records is not None and records[0]["square"] == 0
    assert not (tmp_path / "samples.7.jsonl").exists()


def test_documents_are_shared_exactly(ranks, saved, store, tmp_path):
    alone = shared_work.evaluated(saved, store, tmp_path / "alone")
    found = ranks(2).run(shared_work.evaluated, saved, store, tmp_path / "two")
    assert [writes for *_, writes in found] == [True, False] and alone[2]
    assert [metrics[:2] for metrics in found] == [alone[:2]] * 2
    for name in "pl":
        texts = [(tmp_path / folder / name / SAMPLES).read_text() for folder in ("alone", "two")]
        assert texts[0] == texts[1] and texts[0].count("\n") == {"p": 5, "l": 4}[name]
