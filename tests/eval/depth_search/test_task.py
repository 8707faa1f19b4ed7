"""CoLa as a task: planted optima, controls, killed runs, reports, and the command."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from eval_examples import exact_hybrid, hybrid, read_json
from planted import Planted, all_chains, loaded
from typer.testing import CliRunner

from riverrun.eval import samples
from riverrun.eval.depth_search import report, task
from riverrun.eval.depth_search.answers import Likelihood
from riverrun.eval.depth_search.chains import Space
from riverrun.eval.depth_search.models import Layers
from riverrun.eval.depth_search.questions import Question, make_question
from riverrun.eval.depth_search.task import Chosen, Found, Plan, Records
from riverrun.launch.commands import cola as command
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.model import RiverrunForCausalLM

YES = [Question(f"Number {n}?", ("yes", "not"), ("A", "B"), 0, ("odd", "even")[n % 2]) for n in range(6)]
GENERATED = [make_question(0, number) for number in range(9)]


def run(model, folder, questions=YES, limit=None, **plan):
    return task.run(model, Plan(**{"simulations": 40} | plan), questions, "test", folder, limit=limit)


# what is known by exhaustive search


def test_a_planted_optimum_is_found(tmp_path):
    """Layer 1 spoils the answer, and layer 2 is needed twice: of all chains, (2, 2) is the shortest right one."""
    is_right = lambda chain: 1 not in chain and chain.count(2) >= 2  # noqa: E731
    every = all_chains(Space(tuple(range(3)), 2, 2))
    assert min(filter(is_right, every), key=len) == (2, 2) and not is_right((0, 1, 2))
    model = loaded(Planted(3, is_right))
    (found, chosen, _), _, _ = run(model, tmp_path, simulations=60, k=2, r=2)
    searched = [record for record in found if record.part == "search"]
    assert [(r.base, r.right, r.chain) for r in searched] == 6 * [(False, True, [2, 2])]
    assert all(record.chain == [2, 2] and record.accuracy == 1 and all(record.right) for record in chosen)
    exact = Likelihood(model, Layers(model), YES[0])
    assert exact.right(sorted(every)) == [is_right(chain) for chain in sorted(every)]


def spoilt():
    """Three layers, the second of which writes forty times too much into the residual stream."""
    options = replace(
        hybrid().config.options, layer_pattern=("mamba2", "gated_delta", "attention"), num_hidden_layers=3
    )
    torch.manual_seed(3)
    network = RiverrunForCausalLM(RiverrunConfig.from_options(options)).eval().double()
    with torch.no_grad():
        for layer in (network.model.layers[1].mixer.o_proj, network.model.layers[1].mlp.down_proj):
            layer.weight *= 40
    return loaded(network)


def test_skipping_a_block_that_spoils_the_answer_mends_it():
    """The right choice is what the model says without the block. Beside an exhaustive search of all 1008 chains."""
    model, mended = spoilt(), (0, 2)
    layers = Layers(model)
    questions = []
    for question in (make_question(1, number) for number in range(60)):
        answer = Likelihood(model, layers, question)
        best = answer.scores([mended])[0].argmax().item()
        if answer.scores([(0, 1, 2)])[0].argmax().item() != best:
            questions.append(question._replace(answer=best))
    questions = questions[:4]
    assert len(questions) == 4
    asked = [Likelihood(model, layers, question) for question in questions]  # which keep the states of their prefixes

    def ask(number, _):
        return asked[number]

    whole, few = (task.Cola(Plan(number, k=2, r=1), Space((0, 1, 2), 2, 1), questions, ask) for number in (1500, 40))
    every, hard = sorted(all_chains(Space(tuple(range(3)), 2, 1))), 0
    for number in range(len(questions)):
        right = dict(zip(every, ask(number, 1).right(every)))
        shortest = min(len(chain) for chain, value in right.items() if value)
        hard += shortest == 2
        for cola in (whole, few):
            record = cola.find("search", number)
            assert not record.base and record.right and right[tuple(record.chain)]
            assert len(record.chain) == shortest and right[mended]
            if cola is whole:
                assert (record.evaluations, record.right_chains) == (len(every), sum(right.values()))
    assert hard  # for some, no single layer is enough


def test_a_chain_that_is_right_only_among_others_does_not_count():
    class Flickering(Likelihood):
        def alone(self, chain):
            super().alone(chain)
            return len(chain) > 2

    model = loaded(Planted(3, lambda chain: 1 not in chain))
    layers = Layers(model)
    cola = task.Cola(Plan(60), Space((0, 1, 2), 2, 2), YES, lambda n, _: Flickering(model, layers, YES[n]))
    record = cola.find("search", 0)
    assert record.right and len(record.chain) == 3 and 1 not in record.chain


def test_a_memory_that_is_too_small_is_told():
    def full(number, sharers):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(ValueError, match="too small for 8 chains at a time: lower --leaves"):
        task.Cola(Plan(), Space((0, 1, 2)), YES, full).work([("search", 0)])


# controls


def test_the_random_control_has_the_same_budget(tmp_path):
    (found, *_), _, _ = run(loaded(exact_hybrid()), tmp_path, GENERATED, simulations=30)
    by_part = {part: [r for r in found if r.part == part] for part in ("search", "random")}
    assert [len(own) for own in by_part.values()] == [9, 9] and {r.evaluations for r in found} == {30}
    assert [r.base for r in by_part["search"]] == [r.base for r in by_part["random"]]
    assert all(r.passes > 30 for r in found)


def test_a_held_out_half_is_never_searched(tmp_path):
    asked = []

    class Watched(Likelihood):
        def right(self, chains):
            asked.append(("search", self.number))
            return super().right(chains)

        def alone(self, chain):
            asked.append(("test", self.number))
            return super().alone(chain)

    model = loaded(exact_hybrid())
    layers = Layers(model)

    def ask(number, sharers):
        answer = Watched(model, layers, questions[number])
        answer.number = number
        return answer

    questions = [*GENERATED, GENERATED[0], GENERATED[3]]  # two of them asked twice
    cola = task.Cola(Plan(10), Space(tuple(range(5))), questions, ask)
    for kind in ("addition", "subtraction", "comparison"):
        tested = []
        for half in (0, 1):
            asked.clear()
            record = cola.choose(kind, half)
            searched, others = ({n for what, n in asked if what == w} for w in ("search", "test"))
            assert searched == set(record.searched) and others == set(record.tested)
            assert searched and others and not searched & others
            assert not {questions[n].text for n in searched} & {questions[n].text for n in others}
            tested += record.tested
        assert sorted(tested) == [n for n, question in enumerate(questions) if question.kind == kind]


def test_a_kind_of_one_question_has_no_halves(tmp_path):
    lonely = [*YES, Question("Alone?", ("yes", "not"), ("A", "B"), 0, "alone"), YES[0]._replace(kind="twice")]
    (found, chosen, _), _, _ = run(loaded(Planted(3, lambda chain: True)), tmp_path, lonely * 2, simulations=5)
    assert {record.kind for record in chosen} == {"odd", "even"} and len(found) == 2 * len(lonely) * 2


# runs that are killed


@pytest.mark.parametrize("reward", ["likelihood", "generate"])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, reward):
    model = loaded(exact_hybrid())
    plan = {"simulations": 8, "reward": reward, "new_tokens": 2}
    whole, *_ = run(model, tmp_path / "whole", GENERATED, **plan)
    done = []
    for name in ("find", "choose"):
        work = getattr(task.Cola, name)

        def dying(self, *args, work=work):
            if len(done) in (4, 20):
                done.append("killed")
                raise KeyboardInterrupt
            done.append(args)
            return work(self, *args)

        monkeypatch.setattr(task.Cola, name, dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "killed", GENERATED, **plan)
    assert run(model, tmp_path / "killed", GENERATED, **plan)[0] == whole
    assert len(done) == 2 * 9 + 3 * 2 + 2 and len(set(done)) == len(done) - 1  # nothing twice
    text = [(tmp_path / name / samples.SAMPLES).read_text() for name in ("whole", "killed")]
    assert text[0] == text[1]


def test_seeds_and_more_questions(tmp_path):
    model = loaded(exact_hybrid())
    first, *_ = run(model, tmp_path / "a", GENERATED, limit=4, simulations=12)
    assert run(model, tmp_path / "b", GENERATED, limit=4, simulations=12)[0] == first
    more, *_ = run(model, tmp_path / "a", GENERATED, simulations=12)
    assert [r for r in more[0] if r.number < 4] == first[0] and len(more[0]) == 18
    assert [(r.kind, r.half) for r in more[1]] == [(q.kind, half) for q in GENERATED[:3] for half in (0, 1)]
    assert run(model, tmp_path / "c", GENERATED, simulations=12, seed=1)[0][0] != more[0]
    with pytest.raises(ValueError, match=r"another configuration \(simulations differ\)"):
        run(model, tmp_path / "a", GENERATED, simulations=13)


# reports


def records():
    def found(part, base, chains):
        return [
            Found(part, "sums", n, b, bool(chain), chain, 10, 3, 100) for n, (b, chain) in enumerate(zip(base, chains))
        ]

    base = [True, True, True, False, False]
    return Records(
        [
            *found("search", base, [[0, 1], [1], [0, 1, 2, 3], [2, 2], []]),
            *found("random", base, [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3], [], []]),
        ],
        [
            Chosen("held_out", "sums", 0, [1, 2], [0, 3], 0.5, [1, 2, 4], [True, False, True], 10, 200),
            Chosen("held_out", "sums", 1, [0, 1, 1, 2, 3], [1, 2, 4], 1.0, [0, 3], [True, False], 10, 300),
        ],
        [],
    )


def test_figures_by_hand():
    (result,) = report.summarize(records(), {}, Space((0, 1, 2, 3)), 7)
    expected = {
        "accuracy_base": 3 / 5, "accuracy_search": 4 / 5, "accuracy_random": 3 / 5, "accuracy_held_out": 3 / 5,
        "shorter_search": 2 / 3, "shorter_random": 1 / 3, "shorter_held_out": 1 / 3,
        "saved_search": (1 / 2 + 3 / 4) / 2, "saved_random": 1 / 4, "saved_held_out": 1 / 2,
        "corrected_search": 1 / 2, "corrected_random": 0, "corrected_held_out": 1 / 2, "gain_held_out": 0,
    }  # fmt: skip
    assert result.metrics == pytest.approx(expected)
    assert result.ci95["accuracy_search"] == pytest.approx((0.3755, 0.9638), abs=1e-4)  # Wilson's, 4 of 5
    assert result.documents == 5 and result.available == 7
    details = result.details
    assert details["lengths"] == {"search": {1: 1, 2: 2, 4: 1}, "random": {3: 1, 4: 2}, "held_out": {2: 2, 5: 1}}
    assert details["usage"]["search"] == [2 / 4, 3 / 4, 3 / 4, 1 / 4] and details["usage"]["random"][3] == 2 / 3
    assert details["costs"]["search"] == {"evaluations": 50, "passes": 500, "right_share": 0.3}
    assert details["costs"]["held_out"] == {"evaluations": 20, "passes": 500}
    assert (
        details["questions"]["corrected_held_out"] == 2 and details["by_kind"]["sums"]["accuracy_base"]["value"] == 0.6
    )


def test_shares_of_nothing_are_none():
    found, *_ = records()
    all_right = [r._replace(base=True) for r in found if r.right]
    (result,) = report.summarize(Records(all_right, [], []), {}, Space((0, 1, 2, 3)), 7)
    assert result.metrics["corrected_search"] is None and result.ci95["corrected_search"] is None
    assert result.metrics["accuracy_held_out"] is None and result.details["questions"]["gain_held_out"] == 0
    assert len(report.tables(Records(all_right, [], []), Space((0, 1, 2, 3)))) == 1


# the command


app = typer.Typer()
app.command()(command.cola)
app.command("second")(lambda: None)


def invoke(*args):
    return CliRunner().invoke(app, ["cola", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.mark.parametrize("reward", ["likelihood", "generate"])
def test_the_command_on_generated_questions(saved, tmp_path, reward):
    from matplotlib import image

    args = ["--model", saved, "--generate", 7, "--simulations", 12, "--reward", reward, "--new-tokens", 2]
    args += ["--out", tmp_path / "out"]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    for text in ("7 questions", "corrected", "held out", "cola.png"):
        assert text in result.stdout
    document = read_json(tmp_path / "out" / "results.json")
    found, details = document["results"]["cola"], document["details"]["cola"]
    assert found["accuracy_search,none"] >= found["accuracy_base,none"]
    assert details["num_layers"] == 5 and len(details["usage"]["search"]) == 5
    assert {cost["evaluations"] for part, cost in details["costs"].items() if part != "held_out"} == {7 * 12}
    assert document["configs"]["cola"]["simulations"] == 12 and document["config"]["random_seed"] == 0
    for name in ("cola.png", "layers.png"):
        assert image.imread(tmp_path / "out" / name).shape[1] > 500
    lines = (tmp_path / "out" / samples.SAMPLES).read_text()
    assert len(lines.splitlines()) == 2 * 7 + 3 * 2
    assert invoke(*args).exit_code == 0 and (tmp_path / "out" / samples.SAMPLES).read_text() == lines
    other = invoke(*args, "--seed", 1)
    assert isinstance(other.exception, ValueError) and "(seed differ)" in str(other.exception)


def test_the_command_on_a_file_and_a_foreign_model(foreign, tmp_path):
    rows = [
        {"question": f"Is {n} odd?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
        for n in range(5)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--model", foreign, "--data", tmp_path / "q.jsonl", "--simulations", 5, "--out", tmp_path / "out"]
    result = invoke(*args, "--max-questions", 3)
    assert result.exit_code == 0, result.output
    document = read_json(tmp_path / "out" / "results.json")
    assert document["n-samples"]["cola"] == {"original": 5, "effective": 3}
    assert invoke(*args).exit_code == 0
    assert read_json(tmp_path / "out" / "results.json")["n-samples"]["cola"]["effective"] == 5
    rows[3]["question"] = "x" * 60
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = invoke(*args)
    assert "takes at most 64 tokens, but question 4 with its answer takes" in str(long.exception)


def test_the_task_is_listed_among_the_others():
    from riverrun.launch import cli

    result = CliRunner().invoke(cli.app, ["eval", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert "cola" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "either --data FILE.jsonl, or --generate N"),
        (["--generate", "3", "--data", "x.jsonl"], "either --data FILE.jsonl, or --generate N"),
        (["--generate", "0"], "give at least 1"),
        (["--generate", "3", "--max-questions", "0"], "give at least 1"),
        (["--generate", "3", "--simulations", "1"], "simulations=1 must be at least 2"),
        (["--generate", "3", "--k", "0"], "k=0 must be at least 1"),
        (["--generate", "3", "--r", "0"], "r=0 must be at least 1"),
        (["--generate", "3", "--leaves", "0"], "leaves=0 must be at least 1"),
        (["--generate", "3", "--length-penalty", "-1"], "length_penalty=-1.0 must be at least 0"),
        (["--generate", "3", "--exploration", "nan"], "exploration=nan must be at least 0"),
    ],
)
def test_mistakes_are_value_errors(args, message, saved, tmp_path):
    result = invoke("--model", saved, "--out", tmp_path / "out", *args)
    assert isinstance(result.exception, ValueError) and message in str(result.exception), result.exception
    assert "\n" not in str(result.exception) and not (tmp_path / "out").exists()
