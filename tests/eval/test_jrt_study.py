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


@pytest.mark.parametrize("kind, asked", [("plain", (0, 0)), ("asked", (60, 60)), ("mixed", (36, 54))])
def test_lines_are_asked_for_once(kind, asked):
    made = texts(kind, 60, 6)
    assert made == texts(kind, 60, 6)
    found = list(reports(made))
    assert len(found) == 60 and {len(lines) for _, lines, _ in found} == set(range(1, 7))
    assert len({tuple(lines) for _, lines, _ in found}) == 60
    named = 0
    for lead, lines, after in found:
        if lead:
            cue, value = after[0].split(": ")
            assert cue in (lead, "Answer") and f"{lead}: {value}" in lines
            named += cue == lead
        else:
            assert sorted(after) == sorted(lines)
    before = sum(bool(lead) for lead, _, _ in found)
    assert asked[0] <= before <= asked[1] and 0.15 * before <= named <= 0.45 * before


def test_questions_are_about_new_reports_of_one_size(tmp_path):
    made = texts("questions", 20, 5)
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in made))
    assert len(read_items("fda", path)) == 20
    known = {line for _, lines, _ in reports(texts("plain", 300, 5)) for line in lines}
    for each in made:
        lines = re.findall(LINE, each["text"])
        assert len(lines) == 5 and len(known.intersection(lines)) < 2
