"""Texts for jrt.sh as JSON lines, in which no report is read twice. Arguments: their kind, how many, LINES.

- plain: a report of one to LINES lines, followed by its lines once more, in another order: as many questions, whose
  answers are at hand
- asked: a question before a report and its answer after it, "Information about KEY. REPORT Answer: VALUE." or
  "… REPORT KEY: VALUE."
- mixed: three quarters of them asked, the others plain
- questions: reports of LINES lines that are in no text, with the fields that `riverrun eval jrt --data fda=…` reads

Where answers always follow their key, models write down all lines alike and ignore what was asked before; where they
do not, the question must be kept in mind. A text has one report: where others follow, models learn to forget all of a
report at the next one's title, so that the second reading replaces the first.

Values are pairs of words, two tokens each. Of a number every digit is a token, to be told by its place besides.
"""

import json
import random
import sys
from functools import partial
from multiprocessing import Pool
from typing import Any

from riverrun.eval.jrt_reports import Report, make_report

TRAINING, EVALUATION = 0, 42  # seeds
ASKED = {"plain": 0.0, "asked": 1.0, "mixed": 0.75}  # share of texts with the question before the report
NAMED = 0.3  # of their answers: after the key
BETWEEN = "\n "  # questions: an answer ends its line, so that a model does not go on with others
report = partial(make_report, kinds=["word pair"])


def text(kind: str, lines: int, number: int) -> dict[str, str]:
    rng = random.Random(f"{TRAINING}/{kind}/{lines}/{number}")
    made = report(TRAINING, number, 1, lines)
    return {"text": (asked_before if rng.random() < ASKED[kind] else asked_after)(made, rng)}


def asked_after(made: Report, rng: random.Random) -> str:
    lines = [line for line in made.text.split("\n") if ": " in line]
    return f"{made.text} {BETWEEN.join(rng.sample(lines, len(lines)))}\n"


def asked_before(made: Report, rng: random.Random) -> str:
    key = made.key[0].upper() + made.key[1:]
    cue = key if rng.random() < NAMED else "Answer"
    return f"Information about {key}. {made.text} {cue}: {made.value}.\n"


def question(lines: int, number: int) -> dict[str, Any]:
    return report(EVALUATION, number, lines, lines)._asdict()


if __name__ == "__main__":
    kind, count, lines = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    make = partial(question, lines) if kind == "questions" else partial(text, kind, lines)
    with Pool() as pool:
        for made in pool.imap(make, range(count), chunksize=256):
            print(json.dumps(made))
