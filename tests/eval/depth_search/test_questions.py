"""Questions: as they are read, as they are generated, and what is said about wrong ones."""

import json
import re

import pytest

from riverrun.eval.depth_search.questions import Question, fingerprint, make_question, read_questions

ARC = {"id": "x", "question": "Which is red? ", "choices": {"text": ["a leaf", "blood"], "label": ["1", "2"]}}


def written(tmp_path, *rows):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_both_forms_of_choices(tmp_path):
    listed = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answerKey": "B", "kind": "sums"}
    found = read_questions(written(tmp_path, ARC | {"answerKey": "2"}, "", listed))
    assert found == [
        Question("Which is red?", ("a leaf", "blood"), ("1", "2"), 1, "all"),
        Question("2 + 2?", ("3", "4", "5"), ("A", "B", "C"), 1, "sums"),
    ]
    assert found[0].prompt == "Question: Which is red?\nAnswer:"
    assert found[1].listing == "Question: 2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:"
    assert fingerprint(found) == fingerprint(list(found)) != fingerprint(found[:1])


def listed(*choices, key="A", **rest):
    return {"question": "Q?", "choices": list(choices), "answerKey": key} | rest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("\N{SNOWMAN}", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({"question": "Q?"}, "line 2 lacks choices, answerKey: it needs question, choices"),
        (listed("a"), "line 2 has 1 choices: give at least 2"),
        (listed(), "line 2 has 0 choices: give at least 2"),
        (listed("a", "b", key="C"), "line 2: answerKey='C' is not among the labels A, B"),
        (listed("a", "b", key=["A"]), "is not among the labels A, B"),
        (listed("a", "a"), "the texts of choices must all be different"),
        (listed("a", " "), "the texts of choices must be a list of texts, none of them empty"),
        (listed("a", 3), "the texts of choices must be a list of texts"),
        (listed("a", "b") | {"choices": "ab"}, "the texts of choices must be a list of texts"),
        (listed("a", "b") | {"question": " "}, "question and kind must be texts"),
        (listed("a", "b", kind=3), "question and kind must be texts"),
        (listed(*map(str, range(30))), "30 choices and labels for 26"),
        (ARC | {"choices": {"text": ["a", "b"]}, "answerKey": "1"}, "the labels of choices must be a list"),
        (ARC | {"choices": {"text": ["a", "b"], "label": ["1"]}, "answerKey": "1"}, "2 choices and labels for 1"),
        (ARC | {"choices": {"text": ["a", "b"], "label": ["1", "1"]}, "answerKey": "1"}, "labels of choices must all"),
    ],
)
def test_mistakes_are_told_with_their_line(row, message, tmp_path):
    path = written(tmp_path, listed("a", "b"), row)
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        read_questions(path)
    assert "\n" not in str(told.value) and str(path) in str(told.value)


def test_a_file_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(written(tmp_path, "", "  "))


def test_generated_questions_are_right():
    kinds = set()
    for number in range(150):
        question = make_question(3, number)
        assert question == make_question(3, number)
        a, b = map(int, re.findall(r"\d+", question.text))
        right = {
            "addition": lambda a, b: a + b,
            "subtraction": lambda a, b: a - b,
            "comparison": max if "larger" in question.text else min,
        }[question.kind](a, b)
        assert question.choices[question.answer] == str(right) and len(set(question.choices)) == len(question.choices)
        assert len(question.choices) == (2 if question.kind == "comparison" else 4) == len(question.labels)
        kinds.add((question.kind, question.answer))
    assert len(kinds) == 4 + 4 + 2  # every place of every kind
    assert [make_question(4, n) for n in range(9)] != [make_question(3, n) for n in range(9)]


def test_what_counts_as_the_right_answer():
    question = Question("Q?", ("-5", "The sea."), ("A", "b"), 1)
    for output in (" the sea\nQuestion:", "B", "b.", "(B)", "B. The sea.", "b) the sea", "\n\nTHE SEA."):
        assert question.accepts(output), output
    for output in ("", "A", "sea", "not the sea", "A. The sea", "B or A"):
        assert not question.accepts(output), output
    assert question._replace(answer=0).accepts("-5") and not question._replace(answer=0).accepts("5")
