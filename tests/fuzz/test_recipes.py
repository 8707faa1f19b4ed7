"""Recipes of any kind: each is loaded, or every problem of it is told. Never a traceback, a hang or gigabytes."""

import datetime
import random
import tomllib
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from riverrun.launch import shipped
from riverrun.launch.cli import app
from riverrun.train.recipe import RecipeError, leaves, load_recipe, to_toml
from riverrun.train.recipe_errors import known_keys
from riverrun.train.toml_text import toml_value
from tests.fuzz.mutations import damaged, runs

KEYS = sorted(known_keys())
SECTIONS = sorted({part for key in KEYS for part in key.split(".")})

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 64, 100, 1000, 10**6, 2**31, 2**53, 10**12, 10**30, -1, -64])
SCALARS = st.one_of(
    NUMBERS,
    st.integers(),
    st.floats(),
    st.booleans(),
    TEXT,
    st.sampled_from(["mamba2", "attention", "para_gru", "bf16", "muon", "jrt", "tbtt", "[/red]", "nan", "\x1b[2J"]),
    st.sampled_from([datetime.date(1979, 5, 27), datetime.time(7, 32)]),
)
NAMES = st.one_of(st.sampled_from(SECTIONS), TEXT)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)
OVERRIDES = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(TEXT, VALUES.map(toml_value))),
    st.builds("{}={}".format, st.sampled_from(SECTIONS), VALUES.map(toml_value)),
    st.builds("{}{}{}".format, TEXT, st.sampled_from(["=", "", ".", "=="]), TEXT),
    st.text(max_size=12),  # also what the shell hands on of bytes that are not text
)

fuzz = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}


def check(source, overrides=()):
    """Loaded, and then the same when it is written and read again; or refused with a line a problem."""
    try:
        loaded = load_recipe(str(source), overrides, folder=shipped.FOLDER, require_inputs=False)
    except RecipeError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)
        assert len(str(error)) < 200_000
        return False
    assert loaded.origins.keys() == leaves(loaded.recipe).keys()
    assert tomllib.loads(to_toml(loaded.recipe))
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "any.toml"


@settings(max_examples=runs(500), **fuzz)
@given(st.dictionaries(NAMES, VALUES, max_size=6), st.lists(OVERRIDES, max_size=3))
def test_any_tables(place, tables, overrides):
    place.write_text("".join(f"{toml_value(k)} = {toml_value(v)}\n" for k, v in tables.items()), encoding="utf-8")
    check(place, overrides)


@settings(max_examples=runs(500), **fuzz)
@given(st.sampled_from(shipped.names()), st.lists(OVERRIDES, min_size=1, max_size=4))
def test_any_overrides_of_a_shipped_recipe(name, overrides):
    check(name, overrides)


@settings(max_examples=runs(500), **fuzz)
@given(st.sampled_from(shipped.names()), st.lists(st.tuples(st.sampled_from(KEYS), SCALARS), min_size=1, max_size=4))
def test_values_of_the_schema_s_keys(name, values):
    check(name, [f"{key}={toml_value(value)}" for key, value in values])


def test_damaged_recipes(place):
    rng = random.Random(0)
    texts = [(shipped.FOLDER / f"{name}.toml").read_bytes() for name in shipped.names()]
    accepted = 0
    for _ in range(runs(800)):
        place.write_bytes(damaged(rng, rng.choice(texts)))
        accepted += check(place)
    assert 0 < accepted < runs(800)


def test_a_loaded_recipe_is_the_same_when_read_again(place):
    for name in shipped.names():
        loaded = load_recipe(name, ["data.train=a"], folder=shipped.FOLDER, require_inputs=False)
        place.write_text(to_toml(loaded.recipe), encoding="utf-8")
        assert load_recipe(str(place), require_inputs=False).recipe == loaded.recipe


@settings(max_examples=runs(60) if runs(0) == 0 else 2000, **fuzz)
@given(st.sampled_from(shipped.names()), st.lists(OVERRIDES, max_size=3))
def test_the_command_line_shows_no_traceback(name, overrides):
    overrides = [each for each in overrides if not each.startswith("-")]  # those are options
    done = CliRunner().invoke(app, ["config", name, *overrides], env={"TERM": "dumb", "RIVERRUN_TRACEBACK": ""})
    assert done.exit_code in (0, 2), (overrides, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 0 or "error" in done.output.lower()
    assert "\x1b" not in done.output


ABSURD = [
    "model.num_hidden_layers=1000000000000",
    "model.hidden_size=1000000000000000000",
    f"model.vocab_size=1{'0' * 400}",
    "model.vocab_size=-1000000000000",
    f"train.steps={'1' * 5000}",
    f"train.steps={'[' * 5000}",
    f"train.steps={'{a=' * 3000}",
    f"train.steps={{ {'.'.join(['a'] * 5000)} = 1 }}",
    f"{'.'.join(['a'] * 5000)}=1",
    f"data.train=[{'1,' * 100_000}]",
    f"data.train=[{'{path=1},' * 50_000}]",
    f"name={'x' * 10**6}.5",
    f"model={{ {', '.join(f'k{i}=1' for i in range(5000))} }}",
    "data.seq_len=10000000000000",
    "data.seq_len=2147483647",
    "train.seed=4294967296",
    "train.global_batch_size=1000000000000000000",
    "parallel.tp=1000000007",
    "model.mamba2.expand=1000000000",
    "model.gated_delta.expand_v=1e308",
    "model.para_lstm.expand=1e308",
    "engine.collective_timeout_minutes=1e300",
    'data.train=[{ path = "a", weight = inf }]',
    "model.mamba2.head_dim=16777216",
    "name=\udc80",
]


@pytest.mark.parametrize("override", ABSURD, ids=[each[:40].encode(errors="replace").decode() for each in ABSURD])
def test_what_no_run_can_have_is_refused_before_it_costs_anything(override):
    check("quickstart")  # what is imported and read once
    tracemalloc.start()
    try:
        accepted = check("quickstart", [override])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    assert accepted == override.startswith("name=xxx")
    if not accepted:
        done = CliRunner().invoke(app, ["plan", "quickstart", override, "--gpus", "8"], env={"TERM": "dumb"})
        assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.exception


@pytest.mark.parametrize(
    "content, told",
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"a = " + b"[" * 10**5, "cannot be read as TOML"),
        (b"a = " + b"1" * 5000, "cannot be read as TOML"),
        (b".".join([b"a"] * 5000) + b" = 1", "nested more than"),
        (b"".join(b"k%d = 1\n" % i for i in range(5000)), "more than 2000 values"),
        (b"# " + b"x" * 2**20, "more than 1048576 bytes"),
    ],
    ids=["encoding", "brackets", "digits", "depth", "keys", "bytes"],
)
def test_files_that_are_no_recipes(place, content, told):
    place.write_bytes(content)
    with pytest.raises(RecipeError, match=told) as raised:
        load_recipe(str(place))
    assert str(place) in str(raised.value)


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".toml", "a\0b.toml", "/", ".", "", "[/red]", "\x1b[2J.toml", "\udc80.toml"]
)
def test_names_that_no_recipe_has(name):
    done = CliRunner().invoke(app, ["config", name], env={"TERM": "dumb"})
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.exception
    assert "\x1b" not in done.output


@pytest.mark.parametrize("name", ["\x1b[2Jx", "a\nb", "a\u202eb"])
def test_what_a_recipe_is_called_does_not_steer_the_terminal(place, name):
    place.write_text(f"name = {toml_value(name)}\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["config", str(place)], env={"TERM": "dumb"})
    assert done.exit_code == 2 and "name=" in done.output and "cannot be printed" in done.output
    assert name not in done.output


@pytest.mark.parametrize("name", ["[/red]", "[bold]x"])
@pytest.mark.parametrize("command", [["config"], ["plan", "--gpus", "8"]], ids=["config", "plan"])
def test_what_looks_like_markup_is_shown_as_it_is(command, name):
    done = CliRunner().invoke(app, [*command, "quickstart", f"name={name}"], env={"TERM": "dumb"})
    assert done.exit_code == 0, done.exception
    assert name in done.output


@pytest.mark.parametrize("hidden_size, head_dim", [(65521, 30000), (65521, 16777216), (1024, 4095)])
def test_the_nearest_size_that_divides_is_named(hidden_size, head_dim):
    """Also where there is none near, and none up to twice the size."""
    overrides = [f"model.hidden_size={hidden_size}", f"model.mamba2.head_dim={head_dim}"]
    with pytest.raises(RecipeError, match=r"must divide mamba2.expand × hidden_size = .*; try \d"):
        load_recipe("mamba2-130m", overrides, folder=shipped.FOLDER, require_inputs=False)


@pytest.mark.parametrize("override", ["model.hidden_size=65536", "train.global_batch_size=2147483640"])
def test_what_is_large_but_allowed_can_be_planned(override):
    done = CliRunner().invoke(app, ["plan", "quickstart", override, "--gpus", "8"], env={"TERM": "dumb"})
    assert done.exit_code in (0, 2) and (done.exception is None or isinstance(done.exception, SystemExit))
