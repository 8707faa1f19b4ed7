"""The command line as users meet it: help, exit codes, short messages, the shipped recipes."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from riverrun import __version__
from riverrun.launch import cli, console, shipped
from riverrun.launch.commands.recipes import count_parameters, count_tokens, in_short
from riverrun.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def invoke(*args, env=None):
    return CliRunner().invoke(cli.app, list(args), env={"COLUMNS": "200", "TERM": "dumb"} | (env or {}))


def shell(*args, **env):
    """Run `python ARGS` in a process of its own."""
    import os

    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=dict(os.environ) | {"COLUMNS": "200"} | env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_start_up_imports_nothing_heavy(command):
    code = f"""
import sys
sys.argv = ["riverrun", {command!r}]
from riverrun.launch.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "deepspeed", "transformers", "datasets", "numpy", "pydantic", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = shell("-c", code)
    assert done.returncode == 0, done.stderr
    assert ("Usage: riverrun" if command == "--help" else __version__) in done.stdout


def test_version_and_help():
    assert invoke("--version").output.strip() == f"riverrun {__version__}"
    text = invoke("--help").output
    for name in ("config", "recipes", "doctor", "--install-completion", "RIVERRUN_TRACEBACK"):
        assert name in text


@pytest.mark.parametrize("command", ["config", "recipes", "doctor", "train"])
def test_every_command_explains_itself(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and f"Usage: riverrun {command}" in result.output.replace("root", "riverrun")


def test_usage_errors_exit_with_2():
    assert invoke("confg").exit_code == 2
    assert invoke("config").exit_code == 2
    assert invoke("config", "quickstart", "--tomll").exit_code == 2


def test_user_errors_are_short_and_exit_with_2():
    result = invoke("config", "quickstart", "train.stpes=3", "optimizer.lr=-1")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines()[0] == "error: recipe quickstart has 2 problems:"
    assert "did you mean train.steps?" in result.stderr and "optimizer.lr=-1 (command line)" in result.stderr
    assert "Traceback" not in result.stderr


def test_module_entry_point_has_no_traceback_unless_asked_for():
    args = ("-m", "riverrun.launch.cli", "config", "no-such-recipe")
    done = shell(*args, RIVERRUN_TRACEBACK="")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "no recipe has that name" in done.stderr and "quickstart" in done.stderr
    done = shell(*args, RIVERRUN_TRACEBACK="1")
    assert done.returncode not in (0, 2) and "Traceback" in done.stderr and "RecipeError" in done.stderr


@pytest.fixture
def raising():
    """Run an app of the same class whose only command raises what it is given."""

    def run(error, **env):
        app = typer.Typer(cls=cli.Shell, pretty_exceptions_enable=False)

        @app.callback()
        def root() -> None: ...

        @app.command()
        def fail() -> None:
            raise error

        return CliRunner().invoke(app, ["fail"], env={"TERM": "dumb", "COLUMNS": "20"} | env)

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("lr [red] must be positive"), 2, "error: lr [red] must be positive"),
        (FileNotFoundError(errno.ENOENT, "x", "a/b"), 2, "error: no such file or folder (a/b): check the path"),
        (FileNotFoundError("no token store at a/b"), 2, "error: no token store at a/b"),
        (PermissionError(errno.EACCES, "x", "a/b"), 2, "error: no permission to read or write (a/b): check the path"),
        (
            IsADirectoryError(errno.EISDIR, "x", "a"),
            2,
            "error: this is a folder, but a file is needed (a): check the path",
        ),
        (
            OSError(errno.ENOSPC, "x", "a/b"),
            2,
            "error: disk full (a/b): free some space or write elsewhere; what was saved",
        ),
        (OSError(errno.ENOSPC, "x"), 2, "error: disk full: free some space"),
        (OSError(errno.EDQUOT, "x"), 2, "error: disk quota used up: free some space"),
        (OSError("gpt9 is not a model"), 2, "error: gpt9 is not a model"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_what_the_user_can_mend_is_told_in_a_line(raising, error, code, message):
    result = raising(error)
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a defect"), AssertionError(), OSError(errno.EIO, "x"), KeyError("x")])
def test_defects_keep_their_traceback(raising, error):
    result = raising(error)
    assert result.exception is error and result.exit_code == 1


def test_traceback_on_request(raising):
    error = ValueError("x")
    assert raising(error, RIVERRUN_TRACEBACK="1").exception is error


def test_only_rank_0_prints_and_all_ranks_fail(raising, tmp_path):
    file = tmp_path / "error.json"
    result = raising(ValueError("wrong"), RANK="3", TORCHELASTIC_ERROR_FILE=str(file))
    assert result.exit_code == 2 and result.stderr == ""
    assert json.loads(file.read_text())["message"]["message"] == "wrong"  # what torchrun's summary shows
    result = raising(ValueError("wrong"), RANK="0", TORCHELASTIC_ERROR_FILE=str(file))
    assert result.exit_code == 2 and result.stderr == "error: wrong\n"


def test_a_failure_to_tell_torchrun_hides_nothing(raising, tmp_path):
    result = raising(ValueError("wrong"), TORCHELASTIC_ERROR_FILE=str(tmp_path / "no" / "error.json"))
    assert result.exit_code == 2 and "error: wrong" in result.stderr and "cannot write torchrun's" in result.stderr


def test_under_torchrun():
    done = shell(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "0",
        "-m", "riverrun.launch.cli", "config", "quickstart", "train.stpes=3", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: recipe quickstart has 1 problem") == 1


def test_unicode_errors_are_defects():
    assert console.user_message(UnicodeDecodeError("utf-8", b"", 0, 1, "x")) is None


# config


def test_config_shows_values_with_their_origins():
    result = invoke("config", "quickstart", "train.seed=7", "data.train=tokens/a")
    assert result.exit_code == 0 and result.stderr == ""
    rows = {
        cells[0]: cells[1:]
        for line in result.stdout.splitlines()
        if len(cells := re.split(r"\s*[│]\s*", line)[1:-1]) == 3
    }
    assert rows["train.seed"] == ["7", "command line"]
    assert rows["model.hidden_size"][1] == "recipe quickstart"
    assert rows["model.attention.num_heads"][1] == "derived"
    assert rows["model.attention.window"] == ["unset", "default"]
    assert rows["data.train"] == ['[{ path = "tokens/a", weight = 1.0 }]', "command line"]


def test_config_without_data_warns_and_succeeds():
    result = invoke("config", "quickstart")
    assert result.exit_code == 0 and "train.steps" in result.stdout
    assert result.stderr.startswith("warning: data.train is empty: name a token store")


def test_config_hides_idle_mixers_unless_asked():
    assert "model.mamba2.expand" not in invoke("config", "para-gru-400m").stdout
    assert "model.mamba2.expand" in invoke("config", "para-gru-400m", "--all").stdout


def test_config_as_toml_is_a_recipe(tmp_path):
    result = invoke("config", "hybrid-130m", "data.train=tokens/a", "--toml")
    (tmp_path / "again.toml").write_text(result.stdout)
    assert (
        load_recipe(str(tmp_path / "again.toml")).recipe == shipped.load("hybrid-130m", ["data.train=tokens/a"]).recipe
    )


# recipes


def test_recipes_lists_all():
    result = invoke("recipes")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name in shipped.names():
        assert sum(f" {name} " in line for line in lines) == 1
    [line] = [line for line in lines if " mamba2-130m " in line]
    assert "129M" in line and "2.52B" in line


def test_the_promised_recipes_are_shipped():
    assert set(shipped.names()) == {
        "quickstart", "mamba2-130m", "hybrid-130m", "para-lstm-400m", "para-gru-400m", "olmo-hybrid-1b", "mamba2-1.3b",
        "hybrid-7b", "slstm-400m", "para-gru-1b", "para-gru-3b", "para-gru-7b", "para-lstm-1b", "para-lstm-3b",
        "para-lstm-7b", "mamba2-2.7b", "gated-delta-product-1.3b", "mamba2-attention-7b", "gated-delta-attention-7b",
        "riverrun-1b", "riverrun-7b", "jrt-rnn-360m", "atlas-1.3b", "memora-1.3b", "universal-transformer-64m",
        "recurrent-depth-3.5b", "recurrent-depth-1b", "recurrent-depth-gated-delta-1b", "recurrent-depth-50m",
        "parcae-370m",
        *(f"titans-{x}-{size}" for x in ("lmm", "mac", "mag", "mal") for size in ("170m", "340m", "760m", "1.3b")),
    }  # fmt: skip


@pytest.mark.parametrize("name", shipped.names())
def test_each_shipped_recipe_is_what_it_says(name):
    recipe = shipped.load(name, ["data.train=tokens/a"]).recipe
    assert recipe.name == name
    [(number, letter)] = re.findall(r"\(([\d.]+)([MB]) parameters\)", recipe.description)
    stated = float(number) * {"M": 1e6, "B": 1e9}[letter]
    assert count_parameters(recipe) == pytest.approx(stated, rel=0.03)
    assert count_tokens(recipe) == recipe.train.steps * recipe.train.global_batch_size * recipe.data.seq_len


PUBLISHED = {  # of the model, or of the size that the source names
    "mamba2-130m": 129e6, "mamba2-1.3b": 1.344e9, "mamba2-2.7b": 2.703e9, "hybrid-7b": 7.43e9,
    "gated-delta-product-1.3b": 1.3e9, "para-gru-3b": 2.9e9, "para-lstm-3b": 2.9e9, "para-gru-7b": 6.76e9,
    "para-lstm-7b": 6.76e9, "recurrent-depth-3.5b": 3_564_976_800, "parcae-370m": 370e6,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_sizes(name):
    assert count_parameters(shipped.load(name, require_inputs=False).recipe) == pytest.approx(
        PUBLISHED[name], rel=0.015
    )


@pytest.mark.parametrize("name", [n for n in shipped.names() if re.search(r"-[\d.]+b$", n)])
def test_large_recipes_are_of_their_size_and_can_be_shared(name):
    recipe = shipped.load(name, require_inputs=False).recipe
    size = float(re.search(r"-([\d.]+)b$", name)[1]) * 1e9
    if name != "olmo-hybrid-1b":  # OLMo 2 1B's shape, whose MLPs are wider
        assert count_parameters(recipe) == pytest.approx(size, rel=0.1)
    if name == "recurrent-depth-3.5b":  # as published: 55 heads, 220 tokens a parameter
        return
    assert recipe.model.tp_problems(2) == []
    tokens = 100e9 if re.match("titans|atlas|memora", name) else 20 * count_parameters(recipe)  # as their papers have
    assert count_tokens(recipe) == pytest.approx(tokens, rel=0.05)


def test_completion_of_recipe_names():
    assert [name for name, _ in shipped.complete("mamba2-1")] == ["mamba2-1.3b", "mamba2-130m"]
    assert all(description for _, description in shipped.complete(""))


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1000, "1k"), (3_161_000, "3.16M"), (999_900_000, "1000M"), (1_340_000_000, "1.34B")],
)
def test_in_short(number, text):
    assert in_short(number) == text
