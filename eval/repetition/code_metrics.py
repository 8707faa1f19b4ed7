"""How repetitive the structure of generated Python is, and whether it compiles (arXiv 2505.10402, §5).

    tr_n  1 − unique / all n-grams of grammar symbols, n = 4
    tr_s  the share of statements whose signature occurred before
    ccp   does `compile` take the text; nothing is ever executed

The paper's code tokenizes with parso's grammar of Python 3.7 and drops the first line before compiling; ours has its
own lexer (`python_lines`), compiles by the Python that runs and keeps the first line.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from riverrun.eval.repetition.metrics import duplicates, rep_n
from riverrun.eval.repetition.python_lines import lines_of, statements

SIZE, MEMORY, SECONDS = 2**20, 2**30, 20  # of a text in characters; of the compiling process in bytes and CPU seconds
# runs in a process of its own, since a hostile text can exhaust the compiler's memory or its stack
COMPILE = f"""
import json, resource, sys, warnings
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
warnings.simplefilter("ignore")
for line in sys.stdin:
    try:
        compile(json.loads(line), "generated", "exec", dont_inherit=True)
        found = True
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        found = False
    print(json.dumps(found), flush=True)
"""


def tr_n(text: str, n: int = 4) -> float | None:
    return rep_n([symbol for line in lines_of(text) for symbol in (*line.symbols, "NEWLINE")], n)


def tr_s(text: str) -> float | None:
    return duplicates(statements(lines_of(text)))


def complete_lines(text: str, ended: bool) -> str:
    """A generated text without its last line, unless it was ended there."""
    return text if ended else text[: text.rfind("\n") + 1]


def compiles(texts: Sequence[str]) -> list[bool]:
    """Whether each text is Python. One that is too long, or on which the compiler dies, is not."""
    found: list[bool] = []
    while len(found) < len(texts):
        rest = texts[len(found) :]
        lines = [json.dumps(text if len(text) <= SIZE else "(") for text in rest]
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", COMPILE], input="\n".join(lines) + "\n", capture_output=True, text=True
        )
        new = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode > 0:  # a defect, not a text: Python itself ended with an error
            raise RuntimeError(f"the compiling process failed: {done.stderr.strip()}")
        found += new if len(new) == len(rest) else [*new, False]
    return found
