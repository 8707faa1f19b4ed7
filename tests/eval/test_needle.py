"""Needles: the generators against counting and naive simulation, and scoring with models whose answers are known."""

import json
import random
import re
import uuid
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import typer
from eval_examples import read_json
from typer.testing import CliRunner

from riverrun.eval import haystack, samples
from riverrun.eval.haystack import ACTORS, KINDS, NOISE, PLACES, Cell, make_sample
from riverrun.eval.intervals import wilson
from riverrun.eval.models import load_model
from riverrun.eval.tasks import needle as task
from riverrun.eval.tasks.needle import Plan
from riverrun.launch.commands import length as commands
from riverrun.train.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SENTENCES = [f"Line {i} says {'so ' * (i % 7)}little." for i in range(50)]
NIAH = [kind for kind in KINDS if kind.startswith("niah")]


class Words(ByteTokenizer):
    """A token a word or mark; encoding is not additive over pieces of a word."""

    def encode(self, text):
        return [len(word) % 250 for word in re.findall(r"\w+|[^\w\s]|\n", text)]


def sample(kind, length=2000, depth=0.5, number=0, seed=42, tokenizer=BYTES, text=SENTENCES):
    return make_sample(Cell(kind, length, depth, number), tokenizer, text, seed)


def context(made):
    """The haystack with what is hidden in it, as sentences."""
    inner = made.prompt.split("<context>\n")[-1].split("\n</context>")[0]
    if "<context>" not in made.prompt:
        inner = made.prompt[made.prompt.index("\n") + 1 : made.prompt.rindex("\n")]
    return re.split(r"\n|(?<=[.!?]) (?=[A-Z])", inner.replace(NOISE, "NOISE."))


# Generators


def test_a_sample_by_hand():
    made = make_sample(Cell("niah_single_1", 680, 0.5, 3), BYTES, None, 42)
    key = re.search(r"numbers for (\w+-\w+) is: ", made.prompt)[1]
    assert made.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{NOISE}\nOne of the special magic numbers for {key} is: {made.answer}.\n{NOISE}\n"
        f"What is the special magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is"
    )
    assert re.fullmatch(r"\d{7}", made.answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_what_is_hidden_is_there_once_at_its_depth(kind, depth):
    for number in range(8):
        made = sample(kind, 2500, depth, number)
        if kind.startswith("babilong"):
            continue
        sentences = context(made)
        held = [i for i, sentence in enumerate(sentences) if made.answer in sentence]
        wanted = 2 if kind == "passkey" else 1  # stated twice there
        assert made.prompt.count(made.answer) == wanted
        hidden = [i for i, s in enumerate(sentences) if "special magic" in s or "pass key is" in s]
        if kind == "passkey":
            filler = [i for i, s in enumerate(sentences) if s == "NOISE."]
            place = min(i for i, s in enumerate(sentences) if made.answer in s)
        elif KINDS[kind].filler == "needles":
            filler, place = [i for i in hidden if i not in held], held[0]
        else:
            filler, (place,) = [i for i in range(len(sentences)) if i not in hidden], held
            assert len(hidden) == KINDS[kind].needles
        assert len(filler) > 3
        assert sum(i < place for i in filler) == round(depth * len(filler))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [BYTES, Words()])
@pytest.mark.parametrize("text", [None, SENTENCES])
def test_lengths_are_met_within_one_sentence(kind, tokenizer, text):
    longest = 96 if KINDS[kind].filler != "text" or text is None else 40
    longest = 140 if KINDS[kind].filler == "needles" else longest
    for length in (1500, 3000, 3001, 9000):
        for number in range(2):
            made = make_sample(Cell(kind, length, 0.4, number), tokenizer, text, 1)
            tokens = len(tokenizer.encode(made.prompt)) + KINDS[kind].new_tokens
            assert length - longest <= tokens <= length
            opened = make_sample(Cell(kind, length, 0.4, number), tokenizer, text, 1, opening=9)
            assert len(tokenizer.encode(opened.prompt)) + KINDS[kind].new_tokens <= length - 9


@pytest.mark.parametrize("kind", KINDS)
def test_the_question_is_last(kind):
    made = sample(kind)
    question = made.prompt[made.prompt.rindex("\n", 0, made.prompt.rindex("?")) + 1 :]
    assert question.endswith(("is", "Answer:")) and made.answer not in question
    if kind in NIAH:
        key = re.search(r"magic \w+ for (\S+) mentioned", question)[1]
        assert f"for {key} is: {made.answer}." in made.prompt
        assert made.prompt.count(key) == 3  # the needle, the question, the beginning of the answer


def test_keys_and_values_have_rulers_types():
    for kind in NIAH:
        key, value = re.search(r"for (\S+) is: (\S+)\.", sample(kind).prompt).groups()
        assert str(uuid.UUID(value)) == value if KINDS[kind].value == "uuid" else re.fullmatch(r"[1-9]\d{6}", value)
        assert str(uuid.UUID(key)) == key if KINDS[kind].key == "uuid" else re.fullmatch(r"[a-z]+-[a-z]+", key)
    assert re.fullmatch(r"\d{5}", sample("passkey").answer)


def test_distractors_differ():
    for number in range(20):
        found = re.findall(r"for (\S+) is: (\S+)\.", sample("niah_multikey_1", number=number).prompt)
        assert len(found) == 4 and len({key for key, _ in found}) == len({value for _, value in found}) == 4
        for kind in ("niah_multikey_2", "niah_multikey_3"):
            made = sample(kind, 4000, number=number)
            key = re.search(r"for (\S+) mentioned", made.prompt)[1]
            values = [value for found, value in re.findall(r"for (\S+) is: (\S+)\.", made.prompt) if found == key]
            assert values == [made.answer]


def test_a_sample_is_a_function_of_its_cell_and_the_seed():
    state = random.getstate()
    for kind in KINDS:
        prompts = [
            sample(kind).prompt, sample(kind, number=1).prompt, sample(kind, depth=0.25).prompt,
            sample(kind, length=2400).prompt, sample(kind, seed=1).prompt,
        ]  # fmt: skip
        assert len(set(prompts)) == 5 and sample(kind).prompt == prompts[0]
    assert state == random.getstate()


def test_the_haystack_never_holds_the_answer():
    answer = sample("niah_single_2").answer
    text = [f"By the way, {answer}."] * 5 + SENTENCES
    made = sample("niah_single_2", text=text)
    assert made.answer == answer and made.prompt.count(answer) == 1
    with pytest.raises(ValueError, match="a longer text"):
        sample("niah_single_2", text=text[:5])


def test_a_length_too_short_says_what_is_needed():
    with pytest.raises(ValueError, match=r"needs at least (\d+) tokens: length=300") as caught:
        sample("niah_single_1", 300)
    least = int(re.search(r"least (\d+)", str(caught.value))[1])
    assert least == len(BYTES.encode("".join(haystack.NIAH).format(type="number", key=""))) + 128 + needle_bytes(300)


def needle_bytes(length):
    """Of the needle and of its key in the question, twice."""
    rng = random.Random(f"42/niah_single_1/{length}/0.5/0")
    key, _, sentence = haystack._needle(KINDS["niah_single_1"], rng)
    return len(sentence) + 2 * len(key)


@pytest.mark.parametrize("step", [1, 7, 40])
@pytest.mark.parametrize("budget", [0, 5, 99, 100, 101, 12345])
def test_the_most_sentences_equal_a_linear_search(step, budget):
    def tokens(n):
        return 5 + step * n + (n * n) % 11 // 2 * (step > 10)

    expected = max((n for n in range(13000) if tokens(n) <= budget), default=None)
    assert haystack.most_sentences(tokens, budget) == expected


def test_few_encodings_find_the_length():
    calls = []
    rng = np.random.default_rng(0)
    sums = np.concatenate([[0], rng.integers(5, 60, 10**5).cumsum()])

    def tokens(n):
        calls.append(n)
        return int(sums[n])

    found = haystack.most_sentences(tokens, 10**6)
    assert sums[found] <= 10**6 < sums[found + 1] and len(calls) < 25


def test_a_text_is_cut_into_sentences(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One two.\n\nThree   four? Five! " + "word " * 130)
    found = haystack.read_haystack(path)
    assert found[:3] == ["One two.", "Three four?", "Five!"]
    assert [len(sentence.split()) for sentence in found[3:]] == [60, 60, 10]


# The world


def where(facts, name):
    """The place of a person or a thing, and whether it is known, by replaying sentences with a naive interpreter."""
    places, owner, left = {}, {}, {}
    for fact in facts:
        actor, rest = fact.rstrip(".").split(" ", 1)
        if place := re.search(r" to the (\w+)$", " " + rest):
            places[actor] = place[1]
            continue
        item = rest.split(" the ")[1]
        if rest.startswith(("got", "grabbed", "took", "picked")):
            assert item not in owner and left.get(item, places[actor]) == places[actor]
            owner[item] = actor
        else:
            assert owner.pop(item) == actor
            left[item] = places[actor]
    if name in owner:
        return places[owner[name]]
    return left.get(name, places.get(name))


@pytest.mark.parametrize("kind", ["babilong_qa1", "babilong_qa2"])
def test_the_worlds_answers_are_those_of_a_replay(kind):
    answers = Counter()
    for number in range(150):
        depth = (number % 5) / 4
        made = sample(kind, 2600, depth, number)
        facts = [s for s in context(made) if s.startswith(ACTORS)]
        asked = re.search(r"Where is (?:the )?(\w+)\?\nAnswer:$", made.prompt)[1]
        assert where(facts, asked) == made.answer
        answers[made.answer] += 1
        if kind == "babilong_qa1":
            last = max(i for i, fact in enumerate(facts) if fact.startswith(asked))
        else:  # the last one that changed where the thing is or who holds it
            last = max(i for i in range(len(facts)) if state_after(facts, i, asked) != state_after(facts, i + 1, asked))
        place = [i for i, s in enumerate(context(made)) if s in facts][last]
        ahead = sum(s not in facts for s in context(made)[:place])
        assert ahead == round(depth * (len(context(made)) - len(facts)))
    assert set(answers) == set(PLACES) and max(answers.values()) < 45


def state_after(facts, count, name):
    """The place, and how often the thing changed hands."""
    return where(facts[:count], name), sum(fact.endswith(f" the {name}.") for fact in facts[:count])


# Scoring


@pytest.mark.parametrize(
    ("kind", "answer", "output", "right"),
    [
        ("niah_single_1", "1234567", " 1234567. And so on", True),
        ("niah_single_1", "1234567", " 1234 567", False),
        ("niah_single_3", "ab-cd", "it is AB-CD", True),
        ("babilong_qa1", "kitchen", " the Kitchen. Then the garden", True),
        ("babilong_qa1", "kitchen", " the kitchen or the garden.", False),
        ("babilong_qa1", "kitchen", "\nThe garden. The kitchen.", False),
        ("babilong_qa1", "kitchen", "", False),
    ],
)
def test_what_counts_as_right(kind, answer, output, right):
    assert task.is_correct(kind, answer, output) is right


def test_wilsons_interval():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)  # z² / (10 + z²)
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998
    assert wilson(1, 5) == pytest.approx((0.5655, 1), abs=1e-4)


def oracle(samples):
    """Finds the answer in the prompt's text alone."""
    outputs = []
    for made in samples:
        if "babilong" in made.cell.kind:
            asked = re.search(r"Where is (?:the )?(\w+)\?\nAnswer:$", made.prompt)[1]
            outputs.append(f" {where([s for s in context(made) if s.startswith(ACTORS)], asked)}.")
        elif made.cell.kind == "passkey":
            outputs.append(re.search(r"The pass key is (\d+)", made.prompt)[1])
        else:
            key = re.search(r"for (\S+) mentioned", made.prompt)[1]
            outputs.append(re.search(rf"for {key} is: (\S+)\.", made.prompt)[1])
    return outputs


def scored(folder, plan, answer, **options):
    make = partial(make_sample, tokenizer=BYTES, text=SENTENCES, seed=plan.seed)
    return task.evaluate(plan, folder, {"a": 1}, make, answer, batch_size=7, **options)


def test_an_oracle_is_always_right_and_a_guess_by_chance(tmp_path):
    plan = Plan(tuple(KINDS), (1800, 2600), (0.0, 0.5, 1.0), 5, haystack=Path("given"))
    records = scored(tmp_path / "oracle", plan, oracle)
    assert len(records) == len(KINDS) * 2 * 3 * 5 and all(record.correct for record in records)
    results = task.summarize(records, {}, 30)
    assert [result.task for result in results] == list(KINDS)
    for result in results:
        assert result.metrics == {"accuracy": 1.0, "accuracy@1800": 1.0, "accuracy@2600": 1.0}
        assert len(result.details["cells"]) == 6 and result.details["cells"][0]["total"] == 5

    rng = random.Random(0)
    guesses = Plan(("babilong_qa1", "niah_single_1"), (1500,), (0.5,), 300)
    records = scored(tmp_path / "guess", guesses, lambda batch: [rng.choice(PLACES) for _ in batch])
    places, numbers = task.accuracies(records, "kind")
    assert places["accuracy_95"][0] < 1 / 6 < places["accuracy_95"][1] and numbers["right"] == 0


def test_a_killed_run_goes_on(tmp_path):
    plan = Plan(("passkey", "niah_single_1"), (1000,), (0.0, 1.0), 10)
    whole = scored(tmp_path / "whole", plan, oracle)
    calls = []

    def dying(samples):
        calls.append(len(samples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return oracle(samples)

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        scored(folder, plan, dying)
    lines = (folder / samples.SAMPLES).read_text().splitlines()
    assert len(lines) == 14 and calls == [7, 7, 6]
    (folder / samples.SAMPLES).write_text("\n".join(lines) + "\n" + lines[0][:20])  # died while writing
    seen = []
    assert scored(folder, plan, dying, progress=lambda done, total: seen.append((done, total))) == whole
    assert seen[0] == (14, 40) and seen[-1] == (40, 40) and sum(calls[3:]) == 26
    assert (folder / samples.SAMPLES).read_text() == (tmp_path / "whole" / samples.SAMPLES).read_text()
    assert scored(folder, plan, lambda samples: pytest.fail("nothing is left to do")) == whole


def test_another_configuration_is_refused(tmp_path):
    plan = Plan(("passkey",), (1000,), (0.0,), 2)
    scored(tmp_path, plan, oracle)
    with pytest.raises(ValueError, match=r"another configuration \(a, b differ\).*--out"):
        samples.resume(tmp_path, {"a": 2, "b": 1})
    (tmp_path / samples.SAMPLES).write_text("{}\n")
    with pytest.raises(ValueError, match="damaged"):
        samples.resume(tmp_path, {"a": 1})


# With models


def test_a_length_that_the_model_cannot_take_is_refused(foreign):
    with pytest.raises(ValueError, match="at most 64 tokens"):
        task.run(load_model(foreign), Plan(lengths=(1000,)), Path("unused"), batch_size=1)


app = typer.Typer()
app.command()(commands.length)
app.command()(commands.needle)


def invoke(*args):
    return CliRunner().invoke(app, ["needle", *map(str, args)], env={"COLUMNS": "160", "TERM": "dumb"})


def test_the_command_writes_samples_results_and_a_heat_map(saved, tmp_path):
    from matplotlib import image

    (tmp_path / "text.txt").write_text(" ".join(SENTENCES))
    args = ["--model", saved, "--kind", "passkey", "--kind", "babilong_qa1", "--length", 900, "--length", 1100]
    args += ["--depth", 0, "--depth", 1, "--samples", 2, "--haystack", tmp_path / "text.txt"]
    result = invoke(*args, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "babilong_qa1" in result.stdout and "0.0%" in result.stdout
    document = read_json(tmp_path / "out" / "results.json")
    assert set(document["results"]) == {"passkey", "babilong_qa1"} and document["config"]["random_seed"] == 42
    assert document["n-samples"]["passkey"]["effective"] == 8
    lines = [json.loads(line) for line in (tmp_path / "out" / samples.SAMPLES).read_text().splitlines()]
    assert len(lines) == 16 and {line["depth"] for line in lines} == {0.0, 1.0}
    assert image.imread(tmp_path / "out" / "needle.png").shape[1] > 500
    assert invoke(*args, "--out", tmp_path / "out").exit_code == 0
    assert len((tmp_path / "out" / samples.SAMPLES).read_text().splitlines()) == 16
    other = invoke(*args, "--seed", 1, "--out", tmp_path / "out")
    assert isinstance(other.exception, ValueError) and "(seed differ)" in str(other.exception)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kind", "niah"], "choose among passkey"),
        (["--kind", "niah_single_2"], "with --haystack"),
        (["--length", "100"], "needs at least"),
        (["--length", "0"], "must be at least 1"),
        (["--depth", "50"], "must be in [0, 1]"),
        (["--depth", "0.5", "--depth", "0.5"], "each once"),
        (["--samples", "0"], "must be at least 1"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--haystack", "none"], "cannot be read"),
    ],
)
def test_mistakes_are_value_errors(args, message, saved, tmp_path):
    result = invoke("--model", saved, "--out", tmp_path / "out", *args)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
    assert not (tmp_path / "out" / samples.SAMPLES).exists()
