"""The texts of docs/evaluations/jrt.sh: what is asked, and that no report is read twice."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from riverrun.eval.jrt_formats import read_items

STUDY = Path(__file__).parents[2] / "docs" / "evaluations"
LINE = r"[A-Z][a-z ]+: [a-z]+ [a-z]+\."
REPORT = r"(?:Information about (.+?)\. )?Report on .+\.\n((?:.+\n)+?)(?=Report on|Information about|\Z)"


def texts(*args):
    command = [sys.executable, STUDY / "jrt_texts.py", *map(str, args)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=STUDY.parents[1]).stdout
    return [json.loads(line) for line in out.splitlines()]


def reports(made):
    """(the key asked for before it, a report's lines, those after it) of each report."""
    for lead, body in (found for each in made for found in re.findall(REPORT, each["text"])):
        lines = re.findall(LINE, body)
        number = len(lines) - 1 if lead else len(lines) // 2
        yield lead, lines[:number], lines[number:]


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_lines_are_asked_for_once(kind):
    made = texts(kind, 60, 6)
    assert made == texts(kind, 60, 6)
    found = list(reports(made))
    assert 60 < len(found) < 120 and {len(lines) for _, lines, _ in found} == set(range(1, 7))
    assert len({tuple(lines) for _, lines, _ in found}) == len(found)
    for lead, lines, after in found:
        if lead:
            assert len(after) == 1 and after[0] in lines and after[0].startswith(f"{lead}: ")
        else:
            assert sorted(after) == sorted(lines)
    before = sum(bool(lead) for lead, _, _ in found)
    assert before == 0 if kind == "plain" else 0.3 < before / len(found) < 0.7


def test_questions_are_about_new_reports_of_one_size(tmp_path):
    made = texts("questions", 20, 5)
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in made))
    assert len(read_items("fda", path)) == 20
    known = {line for _, lines, _ in reports(texts("plain", 300, 5)) for line in lines}
    for each in made:
        lines = re.findall(LINE, each["text"])
        assert len(lines) == 5 and len(known.intersection(lines)) < 2
