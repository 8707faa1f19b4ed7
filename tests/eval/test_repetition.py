"""`riverrun eval repetition`: planted models, curves against whole forward passes, resuming, and the command."""

import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
import typer
from eval_examples import exact_hybrid, read_json
from typer.testing import CliRunner

from riverrun.eval import samples
from riverrun.eval.decoding.registry import parse_decodings
from riverrun.eval.models import load_model
from riverrun.eval.repetition import curves, predictions, report
from riverrun.eval.repetition import tasks as sets
from riverrun.eval.repetition.code_set import template_prompt
from riverrun.eval.repetition.tasks import Item, Output
from riverrun.eval.tasks import repetition as task
from riverrun.eval.tasks.repetition import Plan
from riverrun.launch.commands import generate as generate_command
from riverrun.launch.commands import repetition as command
from riverrun.train.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
V, EOS = BYTES.vocab_size, BYTES.eos_id
TEXT = " ".join(f"Line number {i} of this text says {'so ' * (i % 7)}little." for i in range(60))


@pytest.fixture
def loaded(saved):
    found = load_model(saved)
    object.__setattr__(found, "model", exact_hybrid())
    return found


# Planted models


class Asserting:
    """Would rather write another assertion than end, by 0.4 nats; anything else is far below."""

    def logits(self, text):
        scores = torch.full((V,), -20.0)
        line = text[text.rfind("\n") + 1 :]
        number = text.count("\n")
        wanted = f"assert f({number}) == {2 * number}\n"
        scores[ord(wanted[len(line)])] = 4.0
        if not line:
            scores[EOS] = 3.6
        return scores

    def answer(self, decoding, items, new_tokens=200):
        outputs = []
        for item in items:
            processors, tokens = decoding.processors(BYTES), list(item.tokens)
            while len(tokens) < len(item.tokens) + new_tokens:
                scores = self.logits(bytes(tokens).decode())[None]
                tokens.append(int(processors(torch.tensor([tokens]), scores).argmax()))
                if tokens[-1] == EOS:
                    break
            made = tokens[len(item.tokens) :]
            ended = made[-1] == EOS
            made = made[:-1] if ended else made
            outputs.append(Output(made, bytes(made).decode(), ended))
        return outputs


def no_likelihood(items, continuations):
    return [(-float(len(tokens)), {"looking": {}}) for tokens in continuations]


def items_of(texts):
    return [Item(f"planted/{i}", text, BYTES.encode(text), []) for i, text in enumerate(texts)]


ITEMS = items_of(
    ["def f(x): return 2 * x\n" + "".join(f"assert f({i}) == {2 * i}\n" for i in range(1, n)) for n in (3, 4, 5)]
)


def figures(plan, records):
    return {
        row.decoding: {k: v.value for k, v in row.metrics.items()} for row in task.summarize(plan, records, [], []).rows
    }


def test_rpg_ends_what_repeats(tmp_path):
    """And raises EGP, lowers TR-S; every text compiles."""
    plan = Plan(parse_decodings("greedy,rpg,rpg:mode=additive,rpg:eos_boost=0.5"))
    records = task.evaluate(ITEMS, plan, tmp_path, {}, Asserting().answer, no_likelihood, batch_size=2)
    found = figures(plan, records)
    assert found["greedy"]["egp"] == 0 and found["greedy"]["tr_s"] > 0.9
    assert found["rpg"]["egp"] == 1 and found["rpg"]["tr_s"] < 0.7 < found["greedy"]["tr_s"]
    assert found["rpg"]["tr_n"] < found["greedy"]["tr_n"] and found["rpg"]["length"] < found["greedy"]["length"]
    assert all(row["ccp"] == 1 for row in found.values())
    # 0.105 · n > 0.4 from the fourth copy on; 1.5 · n and 0.693 · n from the second
    by_copies = {r["decoding"]: [] for r in records}
    for record in records:
        by_copies[record["decoding"]].append(record["output"].count("assert"))
    assert by_copies["rpg"] == [2, 1, 0] and by_copies["rpg:mode=additive"] == by_copies["rpg:eos_boost=0.5"] == [0] * 3


def test_oracles_and_chance_of_both_sets(tmp_path):
    words = [f"w{i} " for i in range(400)]
    plan = Plan(parse_decodings("greedy"), set="text")

    def unique(decoding, items):
        texts = ["".join(words[i * 7 : i * 7 + 9]) for i in range(len(items))]
        return [Output(list(range(i, i + 20)), text, True) for i, text in enumerate(texts)]

    def constant(decoding, items):
        return [Output([7] * 100, "Again. " * 20, False) for _ in items]

    items = [Item("a", "x", [1], [1, 2, 1, 2]) for _ in range(3)]
    best = figures(plan, task.evaluate(items, plan, tmp_path / "a", {}, unique, no_likelihood, batch_size=2))
    worst = figures(plan, task.evaluate(items, plan, tmp_path / "b", {}, constant, no_likelihood, batch_size=2))
    for name in ("rep_1", "rep_4", "rep_w", "rep_r", "rep_sen"):
        assert best["greedy"][name] == 0 and worst["greedy"][name] > 0.9
    assert best["greedy"]["diversity"] == 1 and worst["greedy"]["diversity"] < 1e-3
    assert best["reference"]["rep_1"] == 0.5 and best["reference"]["rep_2"] == pytest.approx(1 / 3)

    rng = random.Random(0)
    model = Bytes()
    plan = Plan(parse_decodings("greedy,dry"), recall=5, recall_length=700)

    def right(decoding, prompts, new_tokens):
        return [BYTES.encode(re.search(r"The pass key is (\d+)", bytes(p).decode())[1]) for p in prompts]

    def guess(decoding, prompts, new_tokens):
        return [BYTES.encode(f"{rng.randrange(10**5):05d}") for _ in prompts]

    for answer, value in ((right, 1.0), (guess, 0.0)):
        records = task.recall(plan, tmp_path / answer.__name__, {}, model, answer, batch_size=2)
        assert len(records) == 10 and np.mean([r["recall"] for r in records]) == value


class Bytes:
    """What `recall` asks of a model."""

    is_riverrun = True

    def require_tokenizer(self):
        return BYTES


def test_a_killed_run_goes_on_and_decodings_can_be_added(tmp_path):
    plan = Plan(parse_decodings("greedy,rpg"))
    planted, calls = Asserting(), []

    def dying(decoding, items):
        calls.append((decoding.spec, len(items)))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return planted.answer(decoding, items)

    go = partial(task.evaluate, ITEMS, config={"a": 1}, log_likelihood=no_likelihood, batch_size=2)
    whole = go(plan, tmp_path / "whole", answer=planted.answer)
    with pytest.raises(KeyboardInterrupt):
        go(plan, tmp_path / "killed", answer=dying)
    assert len((tmp_path / "killed" / samples.SAMPLES).read_text().splitlines()) == 3
    again = go(plan, tmp_path / "killed", answer=dying)
    assert calls[3:] == [("rpg", 2), ("rpg", 1)]

    def timeless(records):
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records]

    assert timeless(again) == timeless(whole)
    more = go(Plan(parse_decodings("greedy,dry,rpg")), tmp_path / "killed", answer=dying)
    assert calls[5:] == [("dry", 2), ("dry", 1)] and timeless(more)[:3] == timeless(whole)[:3]


# Predictions and curves


def test_predictions_are_those_of_whole_forward_passes(loaded, foreign, monkeypatch):
    rows = [list(b"from swerve of shore to bend"), list(b"ab"), list(b"of bay, brings us")]
    for model in (loaded, load_model(foreign)):
        for logits in (2**25, 3 * V * 4):  # all at once, and four positions at a time
            monkeypatch.setattr(predictions, "LOGITS", logits)
            for row, found in zip(rows, predictions.predict(model, rows)):
                with torch.no_grad():
                    expected = model.model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
                assert found.log_p == pytest.approx(expected[range(len(row) - 1), row[1:]].numpy(), abs=1e-5)
                assert (found.likeliest == expected.argmax(-1).numpy()).all() and len(found.log_p) == len(row) - 1


def test_curves_by_hand(loaded, monkeypatch):
    """Probabilities of two sentences, copied three times, that are known."""
    p = {0: [0.1, 0.2, 0.3, 0.1, 0.5, 0.1], 1: [0.5, 0.5, 0.5]}
    wins = {0: [1, 0, 1, 1, 1, 1], 1: [0, 0, 1]}
    repeated = [curves.Repeated([9, 9], [1, 2]), curves.Repeated([9], [3])]

    def predict(model, rows):
        assert rows == [[9, 9, 1, 2, 1, 2, 1, 2], [9, 3, 3, 3]]
        found = []
        for i, row in enumerate(rows):
            lead = [0.9] * (len(row) - 1 - len(p[i]))
            right = [row[1:][len(lead) + j] if won else 0 for j, won in enumerate(wins[i])]
            found.append(predictions.Predictions(np.log(lead + p[i]), np.array([0] * len(lead) + right)))
        return found

    monkeypatch.setattr(curves, "predict", predict)
    found = curves.average("text", curves.measure(loaded, repeated, 3))
    assert found.ap == pytest.approx([0.8 / 3, 0.9 / 3, 1.1 / 3])  # over the three tokens
    assert found.ip == pytest.approx([0, 1 / 3, 1 / 3]) and found.wr == pytest.approx([1 / 3, 2 / 3, 1])
    assert found.sentences == 2


def test_sentences_of_the_three_sets(loaded, monkeypatch):
    monkeypatch.setattr(curves, "SAMPLED", 24)
    pairs = curves.text_pairs([TEXT, TEXT], 4)
    assert len(pairs) == 4 and pairs[0] == pairs[2] and pairs[0][0].startswith("Line number 0 ")
    made = {kind: [curves.make(loaded, kind, i, pairs[i], 0) for i in range(2)] for kind in curves.SETS}
    assert made["text"][0].sentence == BYTES.encode(" " + pairs[0][1])[: curves.LONGEST]
    assert [len(each.sentence) for each in made["random"]] == [len(each.sentence) for each in made["text"]]
    for each in [*made["random"], *made["text"], *made["own"]]:
        assert each.context[0] == EOS and 1 <= len(each.sentence) <= curves.LONGEST and EOS not in each.sentence
    assert made["own"][0] == curves.make(loaded, "own", 0, pairs[0], 0) != made["own"][1]


# Sets


def test_windows_of_text(loaded, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [TEXT, "short", TEXT[7:]]))
    found = sets.text_items(loaded, path, 5, 100, 0)
    tokens = BYTES.encode(TEXT)
    assert found[0].tokens == tokens[:50] and found[0].reference == tokens[50:150] and found[0].text == TEXT[:50]
    assert found[1].tokens == tokens[7:57] and found[2].tokens == tokens[150:200]  # the second window comes after
    with pytest.raises(ValueError, match="lower --max-new-tokens"):
        sets.text_items(loaded, path, 5, 10**5, 0)
    assert sets.fingerprint(found) != sets.fingerprint(found[:4])


# The command

app = typer.Typer()
app.command("repetition")(command.repetition)
app.command("generate")(generate_command.generate)


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "100", "TERM": "dumb"})


def test_the_command_on_text(saved, tmp_path, monkeypatch):
    from matplotlib import image

    monkeypatch.setattr(curves, "SAMPLED", 24)

    (tmp_path / "text.txt").write_text(TEXT)
    args = ["repetition", "--model", saved, "--set", "text", "--data", tmp_path / "text.txt", "--limit", 2]
    args += [
        "--max-new-tokens",
        8,
        "--recall-samples",
        1,
        "--recall-length",
        300,
        "--sentences",
        1,
        "--copies",
        2,
        "--out",
        tmp_path / "out",
    ]
    result = invoke(*args, "--decoding", "greedy,contrastive:k=2")
    assert result.exit_code == 0, result.output
    for words in ("reference", "contrastive", "diversity", "wrep", "WR", "recall"):
        assert words in result.stdout
    document = read_json(tmp_path / "out" / "results.json")
    names = {f"repetition_text_{name}" for name in ("reference", "greedy", "contrastive:k=2")}
    assert set(document["results"]) == names | {f"self_reinforcement_{name}" for name in curves.SETS}
    greedy = document["results"]["repetition_text_greedy"]
    assert greedy["length,none"] == 8 and greedy["perplexity,none"] > 1 and greedy["recall,none"] == 0
    assert document["higher_is_better"]["repetition_text_greedy"]["diversity"] is True
    lines = [json.loads(line) for line in (tmp_path / "out" / samples.SAMPLES).read_text().splitlines()]
    assert [line["decoding"] for line in lines] == ["reference"] * 2 + ["greedy"] * 2 + ["contrastive:k=2"] * 2
    assert lines[0]["output"] == TEXT[50:58] and set(lines[0]["looking"]) == {"16", "32"}
    for name in ("repetition.png", "curves.png"):
        assert image.imread(tmp_path / "out" / name).shape[1] > 500
    before = (tmp_path / "out" / samples.SAMPLES).read_text()
    assert invoke(*args, "--decoding", "greedy,contrastive:k=2").exit_code == 0
    assert (tmp_path / "out" / samples.SAMPLES).read_text() == before  # seconds included: nothing was done again
    other = invoke(*args, "--decoding", "greedy", "--seed", 1)
    assert isinstance(other.exception, ValueError) and "seed" in str(other.exception)


def test_the_command_on_prompts_from_a_file(saved, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": template_prompt(0, i).text}) + "\n" for i in range(2)))
    result = invoke(
        "repetition", "--model", saved, "--data", path, "--decoding", "rpg,presence", "--max-new-tokens", 6,
        "--no-recall", "--sentences", 0, "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = read_json(tmp_path / "out" / "results.json")["results"]
    assert set(found) == {"repetition_code_rpg", "repetition_code_presence"}
    assert "recall,none" not in found["repetition_code_rpg"] and not (tmp_path / "out" / "curves.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--decoding", "dyr"], "did you mean dry"),
        (["--limit", "0"], "give at least 1"),
        (["--copies", "1"], "at least 2"),
        (["--recall-length", "20"], "needs at least"),
        (["--data", "none"], "no file"),
        (["--set", "text", "--data", "none"], "there is no none"),
    ],
)
def test_mistakes_are_value_errors(args, message, saved, tmp_path):
    small = ["--limit", 1, "--max-new-tokens", 2, "--sentences", 0] if "--limit" not in args else []
    given = ["--decoding", "greedy"] if "--decoding" not in args else []
    result = invoke("repetition", "--model", saved, "--out", tmp_path / "out", *small, *given, *args)
    assert isinstance(result.exception, ValueError) and message in str(result.exception), result.output


def test_what_a_foreign_model_cannot_take_is_refused(foreign, tmp_path):
    prompt = tmp_path / "a.jsonl"
    prompt.write_text('{"prompt": "x = 1\\n"}\n')
    common = ["repetition", "--model", foreign, "--data", prompt, "--max-new-tokens", 4, "--out", tmp_path / "out"]
    for args, message in (
        (["--decoding", "greedy"], "passkeys 512"),
        (["--decoding", "greedy", "--no-recall"], "lower --copies"),
        (["--decoding", "contrastive", "--no-recall", "--sentences", 0], "Riverrun's only"),
    ):
        result = invoke(*common, *args)
        assert isinstance(result.exception, ValueError) and message in str(result.exception), result.output
    assert invoke(*common, "--decoding", "greedy", "--no-recall", "--sentences", 0).exit_code == 0


def test_generate_knows_the_same_decodings(saved):
    def run(*args):
        result = invoke("generate", "--model", saved, "--max-new-tokens", 16, "--prompt", "river", *args)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert run("--decoding", "greedy") == run("--greedy")
    blocked = run("--greedy", "--decoding", "no_repeat_ngram:size=1")
    made = blocked[len("river") :].rstrip("\n")
    assert len(set(made.replace("\ufffd", ""))) == len(made.replace("\ufffd", "")) and blocked != run("--greedy")
    assert run("--decoding", "contrastive:alpha=0.0") == run("--greedy")
    assert run("--decoding", "sample:top_k=1", "--num-samples", 2).count(run("--greedy").strip("\n")) == 2
    for args, message in (
        (["--decoding", "x"], "no decoding 'x'"),
        (["--decoding", "contrastive", "--num-samples", 2], "one text"),
    ):
        result = invoke("generate", "--model", saved, "--prompt", "a", *args)
        assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_a_table_fits_a_terminal():
    row = report.Row("dry", 3, {"egp": report.Figure(0.5, 0.1, (0.4, 0.6)), "tr_n": report.Figure(None, None, None)})
    (table,) = report.tables(report.Findings("code", [row], {}, []))
    assert [column.header for column in table.columns] == ["decoding", "egp", "tr-n"]
    assert list(table.columns[1].cells) == ["0.500\n0.400–0.600"] and list(table.columns[2].cells) == ["–"]
