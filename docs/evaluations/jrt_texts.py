"""Texts for jrt.sh as JSON lines, in which no report is read twice. Arguments: how many, and their kind.

- plain: `read_once`: a report, then one of its lines again
- mixed: one to three different reports; what is asked for comes after each, eight lines of it again, or, half of
  the time, before it too: "Information about KEY. REPORT KEY: VALUE."
"""

import json
import random
import sys
from functools import partial
from multiprocessing import Pool

from riverrun.eval.jrt_reports import make_report, read_once

SEED = 0  # `riverrun eval jrt` asks about reports of seed 42
QUESTIONS = 8


def mixed(number: int) -> str:
    rng = random.Random(f"{SEED}/mixed/{number}")
    parts = []
    for i in range(rng.randint(1, 3)):
        report = make_report(SEED, 3 * number + i)
        if rng.random() < 0.5:
            key = report.key[0].upper() + report.key[1:]
            parts.append(f"Information about {key}. {report.text} {key}: {report.value}.\n")
        else:
            lines = [line for line in report.text.split("\n") if ": " in line]
            parts.append(f"{report.text} {' '.join(rng.sample(lines, QUESTIONS))}\n")
    return "".join(parts)


if __name__ == "__main__":
    count, kind = int(sys.argv[1]), sys.argv[2]
    make = {"plain": partial(read_once, SEED), "mixed": mixed}[kind]
    with Pool() as pool:
        for text in pool.imap(make, range(count), chunksize=256):
            print(json.dumps({"text": text}))
