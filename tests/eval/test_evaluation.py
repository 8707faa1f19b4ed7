"""`riverrun eval` with several tasks and on several ranks, with the tasks that are there and with made-up ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from eval_examples import read_json
from typer.testing import CliRunner

from riverrun.eval import harness
from riverrun.eval import models as model_loading
from riverrun.eval.harness import SampleMetric, TaskResult, Timer, write_results
from riverrun.launch import cli
from riverrun.launch.commands.eval import BatchSize
from riverrun.launch.evaluation import Tasks

ROOT = Path(__file__).parents[2]
Required = Annotated[str, typer.Option()]


def invoke(*args, app=cli.app):
    return CliRunner().invoke(app, ["eval", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def made_up(saved):
    """An app whose tasks write down what they were given, and what that was."""
    given: dict[str, dict] = {}
    app = typer.Typer(cls=cli.Shell, pretty_exceptions_enable=False)
    group = typer.Typer(cls=Tasks)

    @group.callback()
    def eval_(overwrite: bool = False) -> None: ...

    def report(name: str, out: str, value: float | None, **options) -> None:
        import torch

        loaded = model_loading.load_model(saved)
        given[name] = options | {"out": out, "model": loaded, "draw": torch.rand(1).item()}
        result = TaskResult(
            options.get("task", name), 2, {"score": value}, {"score": 0.1}, {"score": True}, 3, 5, {},
            {"score_95": [0, 2]}, sample_metrics={"score": SampleMetric("x")},
        )  # fmt: skip
        write_results(Path(out), [result], loaded, seed=1, batch_size=options["batch_size"], timer=Timer(), limit=3)

    @group.command()
    def one(
        model: Required, data: Required, out: str = "x", seed: int = 0, kind: list[str] | None = None,
        batch_size: BatchSize = 8, both: bool = False,
    ) -> None:  # fmt: skip
        report("one", out, 1.5, data=data, seed=seed, kind=kind, batch_size=batch_size, both=both)

    @group.command()
    def two(
        model: Required, rows: Annotated[int, typer.Option()], out: str = "x", kind: str = "a",
        batch_size: BatchSize = 8, both: str = "", value: float = 0.5, name: str = "two",
    ) -> None:  # fmt: skip
        report("two", out, value, rows=rows, kind=kind, batch_size=batch_size, task=name)

    @group.command()
    def other() -> None: ...

    app.add_typer(group, name="eval")
    app.command()(other)
    return lambda *args: invoke(*args, app=app), given


def test_each_option_goes_to_the_tasks_that_know_it(made_up, tmp_path):
    run, given = made_up
    common = ["--model", "x", "--data", "d", "--rows=7", "--kind", "k", "--batch-size", "auto", "--out", tmp_path]
    result = run("one,two", *common, "--seed", 3)
    assert result.exit_code == 0, result.output
    one, two = given["one"], given["two"]
    assert (one["data"], one["seed"], one["kind"], one["out"]) == ("d", 3, ["k"], str(tmp_path / "one"))
    assert (two["rows"], two["kind"], two["out"]) == (7, "k", str(tmp_path / "two"))  # each reads it in its own way
    assert one["batch_size"] == two["batch_size"] == 64
    assert one["model"] is two["model"]  # loaded once
    merged = read_json(tmp_path / "results.json")
    assert set(merged["results"]) == {"one", "two"} and merged["merged"] == {"one": ["one"], "two": ["two"]}
    assert merged["versions"] == {"one": 2, "two": 2} and merged["results"]["two"]["score,none"] == 0.5
    assert merged["config"]["batch_size"] == "auto" and merged["config"]["limit"] == 3
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "score" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["one", "2", "score", "↑", "1.5000", "0.0000 to 2.0000"],
        ["two", "2", "score", "↑", "0.5000", "0.0000 to 2.0000"],
    ]


def test_tasks_of_one_name_stay_apart(made_up, tmp_path):
    run, _ = made_up
    assert run("one,two", "--model", "x", "--data", "d", "--rows", 1, "--name", "one", "--out", tmp_path).exit_code == 0
    document = read_json(tmp_path / "results.json")
    assert {name: found["score,none"] for name, found in document["results"].items()} == {
        "one/one": 1.5,
        "two/one": 0.5,
    }


def test_the_seed_is_that_of_libraries_too(made_up, tmp_path):
    run, given = made_up
    draws = []
    for seed in (4, 4, 5):
        run("one", "--model", "x", "--data", "d", "--seed", seed, "--out", tmp_path)
        draws.append(given["one"]["draw"])
        assert read_json(tmp_path / "results.json")["config"]["torch_seed"] == seed
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["one,two", "--kind", "k"], "one needs --model, --data; two needs --model, --rows"),
        (["one,two", "--model", "x", "--data", "d"], "two needs --rows"),
        (["one,two", "--model", "x", "--dta", "d"], "none of one, two has an option --dta, did you mean --data?"),
        (["one,two", "--model", "x", "--zzz", "d"], "`riverrun eval one,two --help` lists them"),
        (["one,two", "--both"], "--both means something else in each of one, two"),
        (["one,two", "x"], "'x' is not an option"),
        (["one,two", "--model"], "--model needs a value"),
        (["one,three"], "there is no task 'three'"),
        (["three", "--model", "x"], "choose among one, two (commas between several); the other commands are other"),
        (["one,other"], "there is no task 'other'"),
        (["one,one"], "name each task once"),
        (["one", "--model", "x", "--data", "d", "--batch-size", "many"], "neither auto nor a whole number"),
    ],
)
def test_mistakes_are_told_at_once(args, message, made_up):
    run, given = made_up
    result = run(*args)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()) and not given


def test_help_names_every_tasks_options(made_up):
    run, _ = made_up
    result = run("one,two", "--help")
    assert result.exit_code == 0 and "--data" in result.stdout and "--rows" in result.stdout


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_fails(value, made_up, tmp_path):
    run, _ = made_up
    result = run("two", "--model", "x", "--rows", 1, "--value", value, "--out", tmp_path)
    assert result.exit_code == 1 and "not finite: results two score,none" in result.stderr
    document = read_json(tmp_path / "results.json")
    assert document["results"]["two"]["score,none"] is None and document["non_finite"] == ["results two score,none"]
    result = run("one,two", "--model", "x", "--data", "d", "--rows", 1, "--value", value, "--out", tmp_path)
    assert result.exit_code == 1 and "not finite: two: results" in result.stderr


def test_intervals_are_given_or_normal():
    details = {"b_95": [2, 3]}
    result = TaskResult("t", 1, dict.fromkeys("abcd", 1.0), {"a": 0.5, "c": 0.5}, {}, 1, 1, {}, details, {"a": (0, 9)})
    assert result.interval("a") == (0, 9) and result.interval("b") == (2, 3) and result.interval("d") is None
    assert result.interval("c") == pytest.approx((1 - 0.979982, 1 + 0.979982))


def test_the_real_tasks_together(saved, store, tmp_path, monkeypatch):
    loads, real = [], model_loading._load_folder
    monkeypatch.setattr(model_loading, "_load_folder", lambda *args: loads.append(args) or real(*args))
    args = [
        "perplexity,length",
        "--model",
        saved,
        "--data",
        store,
        "--limit",
        4,
        "--states",
        0,
        "--out",
        tmp_path / "o",
    ]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    assert len(loads) == 1
    document = read_json(tmp_path / "o" / "results.json")
    assert set(document["results"]) == {"perplexity", "length"} and document["schema_version"] == 1
    assert document["ci95"]["perplexity"]["loss"][0] < document["results"]["perplexity"]["loss,none"]
    assert document["n-samples"]["length"] == {"original": 5, "effective": 4}
    assert document["git_dirty"] in (True, False, None) and document["start_time"] <= document["end_time"]
    assert "triton" in document["environment"] and document["config"]["ranks"] == 1
    for part in ("perplexity", "length"):
        own = read_json(tmp_path / "o" / part / "results.json")
        assert own["results"][part] == document["results"][part] and own["command"].startswith("riverrun")
        assert len((tmp_path / "o" / part / "samples.jsonl").read_text().splitlines()) == 4

    before = (tmp_path / "o" / "length" / "samples.jsonl").stat().st_mtime_ns
    assert invoke(*args).exit_code == 0  # nothing is left to do
    assert (tmp_path / "o" / "length" / "samples.jsonl").stat().st_mtime_ns == before
    result = invoke(*args, "--seq-len", 16)
    assert result.exit_code == 2 and "perplexity: " in result.stderr and "(seq_len differ)" in result.stderr
    assert invoke("--overwrite", *args, "--seq-len", 16).exit_code == 0
    result = invoke("compare", tmp_path / "o", tmp_path / "o", "--out", tmp_path / "c")
    assert result.exit_code == 0 and "bootstrap" in result.stdout and "+0.0000" in result.stdout


def test_torchruns_ranks_report_once(saved, store, tmp_path):
    args = ["perplexity", "--model", saved, "--data", store, "--streaming", "--batch-size", 1]
    assert invoke(*args, "--out", tmp_path / "alone").exit_code == 0
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "riverrun.launch.cli",
        "eval",
    ]
    done = subprocess.run(
        [sys.executable, *words, *map(str, args), "--device", "cpu", "--out", str(tmp_path / "ranks")],
        cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results.json and loss_by_position.png beside it") == 1
    alone, shared = (read_json(tmp_path / name / "results.json") for name in ("alone", "ranks"))
    assert shared["results"] == alone["results"] and shared["ci95"] == alone["ci95"]
    assert shared["details"] == alone["details"] and shared["config"]["ranks"] == 2
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("alone", "ranks")]
    assert files[0] == files[1] and "samples.jsonl" in files[0]


def test_a_merged_folder_is_not_told_twice(tmp_path):
    from riverrun.eval.page import evaluations_of

    for name, document in (("", {"merged": {"a": ["a"]}}), ("a", {})):
        (tmp_path / "eval" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "eval" / name / harness.RESULTS).write_text(json.dumps(document))
    assert evaluations_of(tmp_path) == [tmp_path / "eval" / "a"]
