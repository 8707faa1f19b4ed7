"""What stands beside docs/evaluations/depth.sh: the twin, the questions, and the table of real results."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_examples import hybrid, read_json
from typer.testing import CliRunner

from riverrun.eval.depth_search.questions import make_question
from riverrun.launch import cli
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.train.data.tokenizer import ByteTokenizer
from riverrun.train.recipe import load_recipe
from tests.modeling.depth.shapes import SHAPES, build

STUDY = Path(__file__).parents[2] / "docs" / "evaluations"


def python(script, *args):
    command = [sys.executable, STUDY / script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=STUDY.parents[1]).stdout


def test_the_twin_has_as_many_parameters():
    recurrent, fixed = (
        load_recipe(str(path), require_inputs=False).recipe.model
        for path in (STUDY.parents[1] / "launch" / "recipes" / "recurrent-depth-50m.toml", STUDY / "depth.toml")
    )
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in RiverrunForCausalLM(RiverrunConfig.from_options(options)).parameters())
            for options in (recurrent, fixed)
        ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.002)
    assert recurrent.depth is not None and fixed.depth is None
    same = ("depth", "intermediate_size", "initializer", "scale_embedding", "sandwich_norm", "attention")
    assert replace(fixed, **{name: getattr(recurrent, name) for name in same}) == recurrent
    assert replace(fixed.attention, qk_bias=True) == recurrent.attention


def test_questions_that_are_asked_later_are_left_out():
    texts = [json.loads(line)["text"] for line in python("depth_questions.py", 300, 24).splitlines()]
    assert len(texts) == 300 and all(text.count("Question: ") == 8 for text in texts)
    asked = [make_question(0, number) for number in range(24)]
    assert not any(f"{question.prompt} " in text for question in asked for text in texts)
    ours = [make_question(1, number) for number in range(12)]
    lines = "".join(texts)
    assert sum(f"{q.prompt} {q.choices[q.answer]}\n" in lines for q in ours) >= 10  # of them, few are asked later
    assert all(words in lines for words in (" plus ", " minus ", "Which number is"))


def test_the_table_has_the_results_figures(tmp_path, store):
    vocabulary = ByteTokenizer.vocab_size
    models = {"recurrent": build(replace(SHAPES["attention"], vocab_size=vocabulary), torch.float32), "fixed": hybrid()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "models" / name)
        ByteTokenizer().save(tmp_path / "models" / name)
        depths = ["--num-steps", "1,3"] if name == "recurrent" else []
        for task, options in (
            ("perplexity", ["--data", store, *depths]),
            ("cola", ["--generate", 4, "--simulations", 4, "--max-questions", 3]),
        ):
            words = ["eval", task, "--model", tmp_path / "models" / name, "--out", tmp_path / name / task, *options]
            result = CliRunner().invoke(cli.app, list(map(str, words)))
            assert result.exit_code == 0, result.output
    record = {"kind": "train", "step": 7, "tokens_per_second": 1234.4, "loss": 5.4321}
    for name in models:
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    python("depth_table.py", tmp_path)
    table = (tmp_path / "table.md").read_text()
    of = read_json(tmp_path / "recurrent" / "perplexity" / "results.json")["results"]["perplexity_by_depth"]
    assert f"| perplexity | {of['perplexity_r1,none']:.3f} | {of['perplexity_r3,none']:.3f} |" in table
    fixed = read_json(tmp_path / "fixed" / "perplexity" / "results.json")["results"]["perplexity"]
    assert f"fixed depth: perplexity {fixed['perplexity,none']:.3f}" in table
    assert "| recurrent depth | iterations alone |" in table and "| fixed depth | iterations alone |" not in table
    for name in ("recurrent", "fixed"):
        found = read_json(tmp_path / name / "cola" / "results.json")
        accuracy = 100 * found["results"]["cola"]["accuracy_search,none"]
        passes = found["details"]["cola"]["costs"]["search"]["passes"]
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} depth | search |"))
        assert f"| {accuracy:.1f} |" in row and row.endswith(f"| {passes:,} |")
    mean = SHAPES["attention"].depth.mean_recurrence
    assert f"| **{mean}** | " in table and "| 7 | 1,234 | 5.432 |" in table


def test_a_table_of_what_there_is(tmp_path):
    """Evaluations that did not end in time are left out."""
    (tmp_path / "fixed").mkdir()
    record = {"kind": "train", "step": 3, "tokens_per_second": 10.0, "loss": 1.0}
    (tmp_path / "fixed" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    python("depth_table.py", tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| fixed depth | – | 3 | 10 | 1.000 |" in table and "recurrent" not in table
