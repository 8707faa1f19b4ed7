"""Copying, reversing and adding decimal strings, against Python's own."""

import pytest

from riverrun.eval.studies.algorithmic import ASK, END, PLUS, START, Addition
from riverrun.eval.studies.task import IGNORED, TRAIN
from tests.eval.studies.test_generators import Fixed, answers, rows

SYMBOLS = "0123456789.<?+"


def text(tokens: list[int]) -> str:
    return "".join(SYMBOLS[token] for token in tokens)


@pytest.mark.parametrize("name", ["copy", "reverse"])
@pytest.mark.parametrize("length", [1, 7])
def test_strings_come_back(name, length):
    seen = set()
    for inputs, targets in rows(name, length):
        question, _, answer = text(inputs).partition("?")
        assert question[0] == "<" and question[1:].isdigit() and len(question) == 1 + length
        assert answer == question[1:][:: -1 if name == "reverse" else 1]
        assert targets[: length + 1] == [IGNORED] * (length + 1)
        assert text(targets[length + 1 :]) == answer + "."
        seen.update(answer)
    assert seen == set("0123456789")


@pytest.mark.parametrize("least_first", [True, False])
@pytest.mark.parametrize("length", [3, 4, 12])
def test_sums_against_python(least_first, length):
    order = -1 if least_first else 1
    splits = set()
    for inputs, targets in rows("addition", length, 400, least_first=least_first):
        question, _, answer = text(inputs).partition("?")
        a, b = question[1:].split("+")
        assert len(question) == 1 + length
        for number in (a, b):
            assert number.isdigit() and (len(number) == 1 or number[::order][0] != "0"), "no leading zeros"
        total = str(int(a[::order]) + int(b[::order]))[::order]
        assert answer.rstrip(".") == total and text(answers(targets)) == total + "."
        first = length + 1
        assert targets[:first] == [IGNORED] * first
        assert targets[first + len(total) + 1 :] == [IGNORED] * (len(targets) - first - len(total) - 1)
        splits.add(len(a))
    assert splits == set(range(1, length - 1))


def test_a_sum_by_hand():
    """97 + 5, the digits drawn from below, and the first digit of each number once more: 9 and (not used) 3."""
    batch = Addition().sample(
        Fixed([[2]], [[7, 0, 0, 0]], [[9]], [[5, 1, 1, 1]], [[3]]),  # type: ignore[arg-type]
        1, 4,
    )  # fmt: skip
    assert batch.inputs.tolist() == [[START, 7, 9, PLUS, 5, ASK, 2, 0, 1, END]]
    assert batch.targets.tolist() == [[IGNORED] * 5 + [2, 0, 1, END, IGNORED]]


def test_digits_are_uniform_but_the_first():
    batch = Addition().batch(TRAIN, 0, 0, 20_000, 3)
    for column in (1, 3):
        counts = [(batch.inputs[:, column] == digit).mean() for digit in range(10)]
        assert counts == pytest.approx([0.1] * 10, abs=4 * (0.1 * 0.9 / 20_000) ** 0.5)


def test_the_shortest_sum_has_three_symbols():
    assert Addition().problems((2, 40)) == ["addition has no sequences of length 2: the shortest is 3"]
