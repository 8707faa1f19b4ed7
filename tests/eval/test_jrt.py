"""Just Read Twice: prompts by hand, truncation, scores, gains, the generator, killed runs and the command."""

import json
import random
import re

import pytest
import typer
from eval_examples import TEXTS, read_json
from typer.testing import CliRunner

from riverrun.eval import samples
from riverrun.eval.intervals import bootstrap
from riverrun.eval.jrt_formats import FORMATS, prompts, read_items, window
from riverrun.eval.jrt_reports import FEWEST, MOST, make_report
from riverrun.eval.models import load_model
from riverrun.eval.tasks import jrt as task
from riverrun.eval.tasks.jrt import Plan, Record, contains, error_of, figures, token_f1
from riverrun.launch.commands import jrt as command
from riverrun.train.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def made(name, context_length=1000, answer_length=50, **fields):
    return prompts(FORMATS[name].item(**fields), BYTES, context_length, answer_length)


# prompts


def test_reports_by_hand():
    text = "Maker: Acme.\nCode: K12...device type: Device Type:"
    assert made("fda", text=text, key="device type", value=["Pump"]) is None  # nothing of the key is left to be seen
    text = "Maker: Acme. Device type: Pump. Code: K12...device type: Device Type:"
    document = "Maker: Acme. Device type: Pump. Code: K12."
    assert made("fda", text=text, key="device type", value=["Pump"]) == (
        f"{document} Device type:",
        f"Information about Device type. {document}\n{document} Device type:",
    )
    web = "Year: 1999. Director: X Y. Summary of Information Above: the year is 1999. director:"
    assert made("swde", text=web, key="director", value=["X Y"]).default == "Year: 1999. Director: X Y. Director:"


def test_clozes_by_hand():
    fields = {
        "text": "Ada was born in London. She wrote in 1843. Ada was born in ",
        "context": "Ada was born in London. She wrote in 1843. Question: Where was Ada born?",
        "question": "Where was Ada born?",
        "value": ["London"],
    }
    cloze = "Ada was born in London. She wrote in 1843. Ada was born in"
    assert made("squad", **fields) == (
        cloze,
        f"Where was Ada born? Ada was born in London. She wrote in 1843.\n{cloze}",
    )
    assert made("squad", 80, 30, **fields) is None  # longer than 50 tokens


@pytest.mark.parametrize("name", ["nq", "triviaqa", "drop"])
def test_passages_by_hand(name):
    marked = "[DOC] [TLE] Ada" if name == "triviaqa" else "Ada"
    found = made(
        name, context=f"{marked} was born in London.. ada was born in", question="Ada was born in",
        orig_question="where was Ada born:", answers=["London", "in London"],
    )  # fmt: skip
    document = "Ada was born in London."
    assert found == (
        f"{document} Ada was born in",
        f"where was Ada born {document}\n{document} Ada was born in",
    )


def test_long_documents_are_cut_round_the_answer():
    text = "".join(f"{i:03d} " for i in range(100))  # four bytes each, and so tokens
    assert window(text, 200, BYTES, 40) == " ".join(f"{i:03d}" for i in range(45, 55))
    assert window(text, 0, BYTES, 40) == text[:39] and window(text, 396, BYTES, 40) == text[-40:].strip()
    assert window(text, 200, BYTES, 400) == text
    found = made("nq", 50, 10, context=f"{text}end", question="Q", orig_question="W?", answers=["052", "050"])
    assert found.default == " ".join(f"{i:03d}" for i in range(45, 55)) + ". Q"
    absent = made("nq", 50, 10, context=text, question="Q", orig_question="W?", answers=["none"])
    assert absent.default == text[:39] + ". Q"
    away = {"text": "the key: " + text, "key": "the key", "value": ["050"]}
    assert made("fda", 50, 10, **away) is None and made("fda", 1000, 10, **away) is not None


def test_items_without_a_real_answer_are_dropped():
    fields = {"context": "A b c.", "question": "Q", "orig_question": "W?"}
    assert made("nq", answers=["7", " "], **fields) is None and made("nq", answers=[], **fields) is None
    assert made("nq", answers=["7", "b c"], **fields) is not None


def test_sets_are_read_from_json_lines(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(
        '{"text": "A: b.", "key": "a", "value": "bc", "more": 1}\n\n{"text": "C: d.", "key": "c", "value": ["d"]}\n'
    )
    assert [item.answers for item in read_items("fda", path)] == [("bc",), ("d",)]
    for line, message in (
        ('{"text": "A"}', r"line 1 lacks key, value: fda needs text, key, value"),
        ('{"text": "A", "key": "", "value": "b"}', "key must be a text, and not empty"),
        ('{"text": "A", "key": "k", "value": 3}', "value must be a text or a list of texts"),
        ("[1]", "is not a JSON object"),
        ("{", "line 1 is not JSON"),
        ("", "holds no items"),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_items("fda", path)


def test_without_a_hub_the_file_to_give_is_named(monkeypatch):
    import datasets

    def offline(name, split):
        assert (name, split) == ("hazyresearch/based_drop", "validation")
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = r"\(Couldn't reach the hub\).*--data drop=FILE.jsonl.*context, question, orig_question, answers"
    with pytest.raises(ValueError, match=message):
        read_items("drop", None)
    rows = [{"context": "A b.", "question": "Q", "orig_question": "W", "answers": ["b"]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert read_items("drop", "someone/copy")[0].document == "A b"


# the generator


def test_reports_are_of_their_shape_and_reproducible():
    counts = set()
    for number in range(60):
        report = make_report(1, number)
        assert report == make_report(1, number) and report != make_report(2, number)
        pairs = re.findall(r"^([A-Z][a-z ]+): (.+)\.$", report.text, re.MULTILINE)
        counts.add(len(pairs))
        assert FEWEST <= len(pairs) <= MOST and len({key for key, _ in pairs}) == len(pairs)
        assert dict(pairs)[report.key[0].upper() + report.key[1:]] == report.value
        assert report.text.count(report.value) == 1
    assert len(counts) > 15


def test_reports_of_other_shapes():
    for number in range(20):
        report = make_report(1, number, 3, 4, ["word pair"])
        values = re.findall(r": (.+)\.$", report.text, re.MULTILINE)
        assert 3 <= len(values) <= 4 and report.value in values
        assert all(re.fullmatch("[a-z]+ [a-z]+", value) for value in values)


# scores


def test_contains_and_f1():
    assert contains(" it is LONDON.", ["Paris", "London"]) and not contains("Lon don", ["London"])
    assert contains("cost (5.0+)", ["(5.0+)"]) and not contains("cost 5x0", ["5.0"])
    assert token_f1("The Pump, red", ["pump"]) == pytest.approx(2 / 3)
    assert token_f1("red red pump", ["red pump", "blue"]) == pytest.approx(2 * 2 / 5)
    assert token_f1("", ["pump"]) == 0 and token_f1("the", ["a"]) == 1


def test_kinds_of_errors():
    prompt = "Maker: Acme Works. Device type: a small blue Pump, for water. Code:"
    assert error_of(prompt, " \t.") == "no answer"
    assert error_of(prompt, " Device type: a small blue") == "repeats the prompt"
    assert error_of(prompt, " small blue") == "other"  # too short to say
    assert error_of(prompt, " type small blue water") == "other"


def records(once, twice):
    return [
        Record("fda", mode, i, ["x"], "", bool(value), float(value), None)
        for mode, values in (("default", once), ("twice", twice))
        for i, value in enumerate(values)
    ]


def test_the_gain_is_of_pairs():
    once, twice = [0, 1] * 50, [1, 1] * 50
    gain = figures(records(once, twice))["contains_gain"]
    assert gain.value == 0.5 and gain.stderr == pytest.approx((0.25 / 99) ** 0.5)
    assert gain.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and gain.high == pytest.approx(0.6, abs=0.02)
    same = figures(records(once, once))["contains_gain"]
    assert same.value == same.low == same.high == 0  # of equal answers, whatever the accuracy
    low, high = bootstrap([0.0, 1.0] * 200)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    assert bootstrap([0.0, 1.0] * 200) == (low, high)


# the task


def oracle(given):
    """Reads the answer in the prompt."""
    found = []
    for prompt in given:
        key = prompt.rsplit(". ", 1)[1]
        found.append(" " + re.search(rf"^{key} (.+?)\.(?: |$)", prompt, re.MULTILINE)[1] + ".\nmore")
    return found


def scored(folder, answer, number=12, **options):
    questions = task.prepare(Plan(context_length=4000), BYTES, number)
    found = task.evaluate(questions, folder, {"a": 1}, answer, batch_size=5, **options)
    return found, task.summarize(found, questions, {})


def test_an_oracle_is_always_right_and_silence_never(tmp_path):
    found, (result,) = scored(tmp_path / "oracle", oracle)
    assert len(found) == 24 and result.task == "jrt_reports" and result.documents == 12
    assert result.metrics == pytest.approx(
        {f"{m}_{mode}": float(mode != "gain") for m in ("contains", "f1") for mode in ("default", "twice", "gain")}
    )
    assert result.details["contains_gain_95"] == [0, 0] and result.details["contains_twice_95"][0] > 0.7
    assert all("\n" not in record.output for record in found)
    _, (result,) = scored(tmp_path / "silent", lambda given: ["\nPump"] * len(given))
    assert set(result.metrics.values()) == {0.0}
    assert result.details["errors"]["twice"] == {"no answer": 1.0, "repeats the prompt": 0.0, "other": 0.0}


def test_what_is_read_twice_can_be_worth_more(tmp_path):
    """An oracle that needs to have seen the question first."""
    _, (result,) = scored(
        tmp_path, lambda given: [o if p.startswith("Information") else " no" for p, o in zip(given, oracle(given))]
    )
    assert result.metrics["contains_gain"] == 1 and result.details["errors"]["default"]["other"] == 1


def test_a_killed_run_goes_on(tmp_path):
    whole, _ = scored(tmp_path / "whole", oracle)
    calls = []

    def dying(given):
        calls.append(len(given))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return oracle(given)

    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "killed", dying)
    assert scored(tmp_path / "killed", dying)[0] == whole and calls[:3] == [5, 5, 2] and sum(calls[3:]) == 14
    assert scored(tmp_path / "killed", lambda given: pytest.fail("nothing is left to do"))[0] == whole


def test_a_length_that_the_model_cannot_take_is_refused(foreign, tmp_path):
    with pytest.raises(ValueError, match="at most 64 tokens, but a document read twice"):
        task.run(load_model(foreign), Plan(), tmp_path, batch_size=1, limit=2)


# the command


app = typer.Typer()
app.command()(command.jrt)
app.command("second")(lambda: None)


def invoke(*args):
    return CliRunner().invoke(app, ["jrt", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_command_writes_samples_results_and_bars(saved, tmp_path):
    from matplotlib import image

    items = tmp_path / "items.jsonl"
    rng = random.Random(0)
    rows = [
        {"context": text, "question": "It is", "orig_question": "What is it?", "answers": ["Adam's"]} for text in TEXTS
    ]
    items.write_text("".join(json.dumps(row) + "\n" for row in rng.sample(rows, len(rows))))
    args = ["--model", saved, "--format", "reports", "--format", "drop", "--data", f"drop={items}", "--limit", 3]
    args += ["--context-length", 160, "--out", tmp_path / "out"]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    assert "reports" in result.stdout and "drop" in result.stdout and "gain" in result.stdout
    document = read_json(tmp_path / "out" / "results.json")
    assert set(document["results"]) == {"jrt_reports", "jrt_drop"}
    assert document["n-samples"]["jrt_drop"] == {"original": 5, "effective": 3}
    lines = (tmp_path / "out" / samples.SAMPLES).read_text().splitlines()
    assert len(lines) == 12 and {json.loads(line)["mode"] for line in lines} == {"default", "twice"}
    assert image.imread(tmp_path / "out" / "jrt.png").shape[1] > 500
    assert invoke(*args).exit_code == 0
    assert len((tmp_path / "out" / samples.SAMPLES).read_text().splitlines()) == 12
    other = invoke(*args, "--seed", 1)
    assert isinstance(other.exception, ValueError) and "(data, seed differ)" in str(other.exception)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "fad"], "choose among reports, fda"),
        (["--format", "fda", "--format", "fda"], "each once"),
        (["--data", "fda"], "must look like fda=items.jsonl"),
        (["--data", "fda=a", "--data", "fda=b"], "gives fda twice"),
        (["--data", "reports=a"], "reports are generated"),
        (["--format", "nq", "--data", "fda=a"], "data for fda"),
        (["--limit", "0"], "leaves nothing"),
        (["--context-length", "50"], "must be more than answer_length=50"),
        (["--context-length", "52"], "raise --context-length"),
        (["--batch-size", "0"], "at least 1"),
        (["--limit", "1", "--prefix", "-1"], "must not be negative"),
        (["--limit", "1", "--prefix", "8"], "leave the prefix out"),
    ],
)
def test_mistakes_are_value_errors(args, message, saved, tmp_path):
    result = invoke("--model", saved, "--out", tmp_path / "out", *args)
    assert isinstance(result.exception, ValueError) and message in str(result.exception), result.exception
