"""The files by which `riverrun data prepare` goes on, damaged: told of, or of no consequence."""

import json
import random
import shutil

import pytest

from riverrun.train.data.prepare import prepare
from tests.fuzz.mutations import altered_json, runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "a.txt").write_text("some text")
    prepare([folder / "a.txt"], folder / "out", tokenizer="bytes")
    return folder


def test_damaged_reports(prepared):
    rng, path = random.Random(0), prepared / "out" / "prepare.json"
    value, accepted = json.loads(path.read_bytes()), 0
    for _ in range(runs(1000)):
        path.write_bytes(altered_json(rng, value))
        try:
            prepare([prepared / "a.txt"], prepared / "out", tokenizer="bytes")
            accepted += 1
        except ValueError as error:
            assert str(prepared) in str(error)
    assert accepted > 0
    path.write_text(json.dumps(value))


def test_damaged_plans(prepared, tmp_path):
    rng = random.Random(0)
    value = json.loads((prepared / "out" / "prepare.json").read_bytes())["plan"]
    for _ in range(runs(200)):
        out = tmp_path / "out"
        (out / ".work").mkdir(parents=True)
        (out / ".work" / "plan.json").write_bytes(altered_json(rng, value))
        try:
            prepare([prepared / "a.txt"], out, tokenizer="bytes")
        except ValueError as error:
            assert str(out) in str(error)
        shutil.rmtree(out)
