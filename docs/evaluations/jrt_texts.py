"""Texts for jrt.sh as JSON lines, in which no report is read twice. Arguments: their kind, how many, LINES.

- plain: one or two reports of one to LINES lines, each followed by its lines once more, in another order: as many
  questions, whose answers are at hand
- mixed: the same, but half of the reports are followed by one line only, which was asked for before them, too:
  "Information about KEY. REPORT KEY: VALUE."
- questions: reports of LINES lines that are in no text, with the fields that `riverrun eval jrt --data fda=…` reads

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
ASKED_BEFORE = 0.5  # of the reports of mixed texts
BETWEEN = "\n "  # questions: an answer ends its line, so that a model does not go on with others
report = partial(make_report, kinds=["word pair"])


def text(kind: str, lines: int, number: int) -> dict[str, str]:
    rng = random.Random(f"{TRAINING}/{kind}/{lines}/{number}")
    made = [report(TRAINING, 2 * number + i, 1, lines) for i in range(rng.randint(1, 2))]
    before = [kind == "mixed" and rng.random() < ASKED_BEFORE for _ in made]
    return {"text": "".join(asked_before(r) if first else asked_after(r, rng) for r, first in zip(made, before))}


def asked_after(made: Report, rng: random.Random) -> str:
    lines = [line for line in made.text.split("\n") if ": " in line]
    return f"{made.text} {BETWEEN.join(rng.sample(lines, len(lines)))}\n"


def asked_before(made: Report) -> str:
    key = made.key[0].upper() + made.key[1:]
    return f"Information about {key}. {made.text} {key}: {made.value}.\n"


def question(lines: int, number: int) -> dict[str, Any]:
    return report(EVALUATION, number, lines, lines)._asdict()


if __name__ == "__main__":
    kind, count, lines = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    make = partial(question, lines) if kind == "questions" else partial(text, kind, lines)
    with Pool() as pool:
        for made in pool.imap(make, range(count), chunksize=256):
            print(json.dumps(made))
