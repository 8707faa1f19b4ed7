"""Questions and their answers for depth.sh as JSON lines, eight a text. Arguments: how many texts, and how many of the
questions of `riverrun eval cola --generate` are to be asked later: those are left out."""

import json
import sys
from itertools import count, islice

from riverrun.eval.depth_search.questions import make_question

SEED, ASKED = 1, 0  # ours, and that of `riverrun eval cola`
EACH = 8

number, asked = int(sys.argv[1]), int(sys.argv[2])
taboo = {make_question(ASKED, i).text for i in range(asked)}
questions = (question for question in (make_question(SEED, i) for i in count()) if question.text not in taboo)
lines = (f"{question.prompt} {question.choices[question.answer]}\n" for question in questions)
for _ in range(number):
    print(json.dumps({"text": "".join(islice(lines, EACH))}))
