"""Differences between evaluations, against numbers computed by hand and the spread of repeated draws."""

import json

import numpy as np
import pytest
from eval_examples import read_json
from typer.testing import CliRunner

from riverrun.eval import compare as comparison
from riverrun.eval.compare import compare, load, mcnemar
from riverrun.launch import cli

LOSS = {"value": "nats", "weight": "tokens", "where": {}, "scale": 1.0, "exponential": False}
RIGHT = {"value": "correct", "weight": None, "where": {"kind": "key"}, "scale": 1.0, "exponential": False}


def write(folder, samples, metrics, sample_metrics, *, stderr=0.1, model="a", version=1, task="task", **config):
    """Results of one task as `write_results` has them."""
    folder.mkdir(parents=True)
    results = {"alias": task}
    for name, value in metrics.items():
        results |= {f"{name},none": value, f"{name}_stderr,none": stderr}
    document = {
        "results": {task: results},
        "configs": {task: {"task": task, "model_fingerprint": model, **config}},
        "versions": {task: version},
        "higher_is_better": {task: dict.fromkeys(metrics, True)},
        "sample_metrics": {task: sample_metrics},
        "tokenizer_fingerprint": "t",
    }
    (folder / "results.json").write_text(json.dumps(document))
    lines = [json.dumps({"key": list(key), **record}) + "\n" for key, record in samples.items()]
    (folder / "samples.jsonl").write_text("".join(lines))
    return folder


def answers(rights, kind="key"):
    return {(number,): {"kind": kind, "correct": bool(right)} for number, right in enumerate(rights)}


def difference(tmp_path, a, b, formula, **options):
    one = write(tmp_path / "a", a, {"m": 0.0}, {"m": formula})
    other = write(tmp_path / "b", b, {"m": 0.0}, {"m": formula}, model="b", **options)
    (found,) = compare(load(one), load(other))
    return found


def test_mcnemar_by_hand():
    interval, p = mcnemar(1, 4, 10)
    reach = 1.959964 * (6 - 9 / 12) ** 0.5 / 12
    assert interval == pytest.approx((0.25 - reach, 0.25 + reach)) and p == pytest.approx(2 * (1 + 5) / 32)
    interval, p = mcnemar(0, 0, 10)
    assert p == 1 and interval[1] == pytest.approx(1.959964 / 12) == -interval[0]  # not of no width
    assert mcnemar(10, 0, 10)[0][0] == -1


def test_right_and_wrong_are_paired_by_key(tmp_path):
    a = answers([1, 1, 0, 0, 0, 0, 0, 1, 1, 0])
    b = dict(reversed(answers([1, 0, 1, 1, 1, 1, 0, 1, 1, 0]).items())) | {(99,): {"kind": "key", "correct": True}}
    a |= {(50,): {"kind": "other", "correct": True}}
    found = difference(tmp_path, a, b, RIGHT)
    assert (found.a, found.b, found.samples, found.method) == (0.4, 0.7, 10, "McNemar")
    assert found.difference == pytest.approx(0.3) and (found.interval, found.p) == mcnemar(1, 4, 10)


def test_samples_without_a_value_are_left_out(tmp_path):
    """A metric may be undefined for some texts, and differently so for two models."""
    formula = {**RIGHT, "value": "share", "where": {}}
    a = {(i,): {"share": value} for i, value in enumerate([0.5, None, 0.25, 0.75])}
    b = {(i,): {"share": value} for i, value in enumerate([1.0, 0.5, None, 0.75])}
    found = difference(tmp_path, a, b, formula)
    assert (found.a, found.b, found.samples, found.method) == (0.625, 0.875, 2, "bootstrap")
    nothing = {key: {"share": None} for key in a}
    assert difference(tmp_path / "none", nothing, b, formula).method == "independent"


def test_losses_are_paired_by_document(tmp_path):
    """Documents differ far more than the models do."""
    rng = np.random.default_rng(0)
    tokens, level = rng.integers(5, 50, 60), rng.uniform(1, 9, 60)
    losses = {name: tokens * (level + rng.normal(shift, 0.1, 60)) for name, shift in (("a", 0.0), ("b", 0.2))}
    samples = {
        name: {(i,): {"nats": nats[i], "tokens": int(tokens[i])} for i in range(60)} for name, nats in losses.items()
    }
    found = difference(tmp_path, samples["a"], samples["b"], LOSS)
    assert found.a == pytest.approx(losses["a"].sum() / tokens.sum())
    gaps = losses["b"] - losses["a"]
    expected = gaps.sum() / tokens.sum()
    assert found.difference == pytest.approx(expected) and found.method == "bootstrap" and found.samples == 60
    residuals = gaps - expected * tokens  # of a ratio estimator
    error = (residuals**2).sum() ** 0.5 / tokens.sum()
    assert found.interval == pytest.approx((expected - 1.96 * error, expected + 1.96 * error), abs=0.15 * error)
    assert found.interval[0] > 0
    for scale, exponential, value in ((2.0, False, 2 * expected), (1.0, True, np.exp(found.b) - np.exp(found.a))):
        formula = {**LOSS, "scale": scale, "exponential": exponential}
        folder = tmp_path / f"{scale}{exponential}"
        assert difference(folder, samples["a"], samples["b"], formula).difference == pytest.approx(value)


def test_the_interval_covers_the_truth(tmp_path):
    rng, inside = np.random.default_rng(1), []
    metrics = (comparison.SampleMetric("x"), comparison.SampleMetric("x"))
    for _ in range(60):
        shared = rng.normal(0, 5, 40)
        both = [shared + rng.normal(shift, 1, 40) for shift in (0.0, 0.5)]
        samples = tuple({(i,): {"x": x} for i, x in enumerate(values)} for values in both)
        found = comparison.paired(samples, metrics)
        inside.append(found[3][0] < 0.5 < found[3][1])
    assert 0.85 < np.mean(inside) <= 1


def test_metrics_without_samples_are_independent(tmp_path):
    one = write(tmp_path / "a", {}, {"m": 1.0, "n": None}, {}, stderr=0.3)
    other = write(tmp_path / "b", {}, {"m": 1.5, "n": 2.0}, {}, stderr=0.4)
    m, n = compare(load(one), load(other))
    assert m.method == "independent" and m.samples is None and m.difference == 0.5
    assert m.interval == pytest.approx((0.5 - 1.959964 * 0.5, 0.5 + 1.959964 * 0.5))
    assert n.difference is None and n.interval is None


def test_what_does_not_compare_is_refused_by_name(tmp_path):
    base = load(write(tmp_path / "a", {}, {"m": 1.0}, {}, seed=1, model_dtype="fp32"))
    compare(base, load(write(tmp_path / "same", {}, {"m": 1.0}, {}, seed=1, model="b", model_dtype="bf16")))
    other = load(write(tmp_path / "b", {}, {"m": 1.0}, {}, seed=2, version=2))
    with pytest.raises(
        ValueError, match=r"task does not compare: seed \(1, 2\), version \(1, 2\) differ.*--ignore seed"
    ):
        compare(base, other)
    assert len(compare(base, other, ["seed", "version"])) == 1
    with pytest.raises(ValueError, match="no task in common"):
        compare(base, load(write(tmp_path / "c", {}, {"m": 1.0}, {}, task="elsewhere")))


def test_the_command(tmp_path):
    from matplotlib import image

    rights = {"a": [0, 0, 0, 1] * 10, "b": [1, 1, 0, 1] * 10, "c": [0, 0, 0, 1] * 10}
    for name, right in rights.items():
        metrics = {"accuracy": sum(right) / 40, "accuracy@9": 0.5}
        write(tmp_path / name / "part", answers(right), metrics, {"accuracy": RIGHT}, model=name)
        document = read_json(tmp_path / name / "part" / "results.json") | {"merged": {"part": ["task"]}}
        (tmp_path / name / "results.json").write_text(json.dumps(document))  # its samples are in the part's folder
    folders = [str(tmp_path / name) for name in rights]
    result = CliRunner().invoke(cli.app, ["eval", "compare", *folders, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    document = read_json(tmp_path / "out" / "compare.json")
    assert document["baseline"] == folders[0] and [c["model"] for c in document["comparisons"]] == folders[1:]
    better, same = (c["differences"][0] for c in document["comparisons"])
    assert better["difference"] == 0.5 and better["p"] == pytest.approx(2**-19) and better["samples"] == 40
    assert same["difference"] == 0 and same["interval"][0] < 0 < same["interval"][1]
    for text in ("+0.5000", "McNemar", "not paired", "independent", "1.9e-06"):
        assert text in result.stdout
    assert image.imread(tmp_path / "out" / "compare.png").shape[1] > 500
    for args, message in (([folders[0]], "two folders"), ([folders[0], str(tmp_path)], "holds no results")):
        result = CliRunner().invoke(cli.app, ["eval", "compare", *args])
        assert result.exit_code == 2 and message in result.stderr
