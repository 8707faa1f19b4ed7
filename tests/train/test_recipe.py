"""Reading recipes: what is accepted, where each value comes from, and what every error says."""

import re

import pytest

from riverrun.train.config import Recipe
from riverrun.train.recipe import RecipeError, difference, leaves, load_recipe, to_toml, unused

BASE = """
name = "tiny"
[model]
vocab_size = 64
hidden_size = 32
num_hidden_layers = 2
layer_pattern = ["mamba2", "attention"]
[model.mamba2]
head_dim = 16
[model.attention]
head_dim = 8
[data]
train = "tokens/a"
[schedule]
warmup_steps = 10
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(text=BASE, name="tiny.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def problems(source, *overrides, **kwargs):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, **kwargs)
    assert all(p in str(caught.value) for p in caught.value.problems)
    return caught.value.problems


def the_problem(source, *overrides):
    found = problems(source, *overrides)
    assert len(found) == 1, found
    return found[0]


def test_values_and_their_origins(recipe_file):
    source = recipe_file()
    loaded = load_recipe(source, ["train.steps=20", "optimizer.betas=[0.8, 0.9]", "model.mamba2={state_size = 16}"])
    assert loaded.recipe.train.steps == 20
    assert loaded.recipe.optimizer.betas == (0.8, 0.9)
    assert (loaded.recipe.model.mamba2.state_size, loaded.recipe.model.mamba2.head_dim) == (16, 16)
    assert loaded.recipe.model.attention.num_heads == 4 and loaded.recipe.model.intermediate_size == 128
    assert loaded.origins.keys() == leaves(loaded.recipe).keys()
    expected = {
        "train.steps": "command line",
        "model.mamba2.state_size": "command line",
        "model.mamba2.head_dim": f"recipe {source}",
        "model.layer_pattern": f"recipe {source}",
        "model.attention.num_heads": "derived",
        "model.intermediate_size": "derived",
        "data.train": f"recipe {source}",
        "train.seed": "default",
    }
    assert {key: loaded.origins[key] for key in expected} == expected


def test_a_zero_written_in_a_recipe_is_derived_too(recipe_file):
    loaded = load_recipe(recipe_file(), ["model.attention.num_kv_heads=0"])
    assert (loaded.recipe.model.attention.num_kv_heads, loaded.origins["model.attention.num_kv_heads"]) == (
        4,
        "derived",
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=1", 1.0),
        ("train.dtype=fp32", "fp32"),
        ('train.dtype="fp32"', "fp32"),
        ("train.recompute=true", True),
        (" train.steps = 1_000 ", 1000),
        ("data.tokenizer=a=b", "a=b"),
        ("data.tokenizer=1\nx=2", "1\nx=2"),
        ("model.layer_pattern=['attention']", ["attention"]),
        ("model.attention.window=64", 64),
        ("data.train=tokens/b", [{"path": "tokens/b", "weight": 1.0}]),
        ('data.train=["b", "c"]', [{"path": "b", "weight": 1.0}, {"path": "c", "weight": 1.0}]),
        ('data.train=[{path="b", weight=2}, "c"]', [{"path": "b", "weight": 2.0}, {"path": "c", "weight": 1.0}]),
        ('data.train={path="b"}', [{"path": "b", "weight": 1.0}]),
    ],
)
def test_override_values(recipe_file, text, value):
    key = text.partition("=")[0].strip()
    loaded = load_recipe(recipe_file(), [text])
    assert leaves(loaded.recipe)[key] == value and loaded.origins[key] == "command line"


def test_the_last_override_wins(recipe_file):
    assert load_recipe(recipe_file(), ["train.seed=1", "train.seed=2"]).recipe.train.seed == 2


def test_names_are_looked_up_in_the_folder(tmp_path, recipe_file):
    recipe_file()
    assert load_recipe("tiny", folder=tmp_path).origins["model.vocab_size"] == "recipe tiny"
    [message] = problems("tinny", folder=tmp_path)
    assert "did you mean tiny?" in message and "path of a .toml file" in message


def test_missing_file_and_folder(tmp_path):
    assert "does not exist: give the path of a TOML file" in problems(str(tmp_path / "no.toml"))[0]
    (tmp_path / "dir.toml").mkdir()
    assert "is a folder" in problems(str(tmp_path / "dir.toml"))[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys
        ("train.stpes=3", "train.stpes (command line) is not a recipe key: did you mean train.steps?"),
        ("model.hiden_size=3", "model.hiden_size (command line) is not a recipe key: did you mean model.hidden_size?"),
        ("model.mamba2.state_sise=3", "did you mean model.mamba2.state_size?"),
        ("train.lr=3", "train.lr (command line) is not a recipe key: did you mean optimizer.lr?"),
        (
            "chunk_size=3",
            "did you mean model.mamba2.chunk_size, model.gated_delta.chunk_size, "
            "model.prefix_linear_attention.chunk_size or one of 10 others?",
        ),
        ("tolerance=3", "did you mean model.para_gru.tolerance or model.para_lstm.tolerance?"),
        ("trian.x=3", "trian (command line) is not a recipe key: did you mean train?"),
        ("engine.foo=3", "engine.foo (command line) is not a recipe key: [engine] has device, zero_stage, over"),
        ("bar=3", "bar (command line) is not a recipe key: a recipe has name, description, profile, model"),
        ('data.train=[{path="a", wieght=2}]', "data.train[0].wieght (command line) is not a recipe key: did you mean"),
        ("train.steps.x=3", "train.steps={ x = 3 } (command line) must be a whole number, for example"),
        ("name.x=3", "name is a value, not a table: it has no key 'x'; drop .x"),
        # types
        ("train.steps=many", 'train.steps="many" (command line) must be a whole number, for example train.steps=1000'),
        ('train.steps="20"', 'train.steps="20" (command line) must be a whole number: write it without quotes'),
        (
            "checkpoint.every=1e3",
            "checkpoint.every=1000.0 (command line) must be a whole number: write checkpoint.every=1000",
        ),
        ("train.seed=true", "train.seed=true (command line) must be a whole number, for example train.seed=0"),
        ("train.recompute=True", "must be true or false: write train.recompute=true"),
        ("log.wandb=0", "must be true or false: write log.wandb=false"),
        ("data.tokenizer=5", 'data.tokenizer=5 (command line) must be text in quotes: write data.tokenizer="5"'),
        ("optimizer.lr=fast", 'optimizer.lr="fast" (command line) must be a number, for example optimizer.lr=0.0003'),
        ("model.layer_pattern=mamba2", """must be a list: write 'model.layer_pattern=["mamba2"]'"""),
        ("model.layer_pattern=[mamba2,attention]", """write 'model.layer_pattern=["mamba2", "attention"]'"""),
        ("model.attention=4", "must be a table of options: write a table [model.attention] with some of num_heads"),
        ("train=3", "train=3 (command line) must be a table of options: write a table [train] with some of steps"),
        ("data.train=3", 'data.train=3 (command line) must be a list, for example data.train=["tokens/web"]'),
        ("data.train=[{weight=1.0}]", "data.train[0] (command line) lacks 'path': add it, as in data.train=[{ path"),
        ("optimizer.betas=[0.9]", "[0.9] (command line) is too short, for example optimizer.betas=[0.9, 0.95]"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "must be a list of 2, for example optimizer.betas=[0.9, 0.95]"),
        ("optimizer.lr=2020-01-01", "optimizer.lr=2020-01-01 (command line) is a date or a time"),
        # ranges and choices
        ("train.z_loss=-1", "train.z_loss=-1 (command line) must be at least 0, for example train.z_loss=0.0"),
        ("optimizer.lr=0", "optimizer.lr=0 (command line) must be greater than 0, for example optimizer.lr=0.0003"),
        ("schedule.min_lr_ratio=2", "must be at most 1, for example schedule.min_lr_ratio=0.1"),
        ("optimizer.muon_momentum=1", "must be less than 1, for example optimizer.muon_momentum=0.95"),
        ("optimizer.lr=inf", "optimizer.lr=inf (command line) must be finite: give a number"),
        ("model.norm_eps=nan", "model.norm_eps=nan (command line) must be finite: give a number"),
        (
            "train.dtype=fp8",
            """train.dtype="fp8" (command line) must be one of 'bf16' or 'fp32', for example train.dtype""",
        ),
        ("schedule.name=cosin", "must be one of 'cosine' or 'wsd': did you mean 'cosine'?"),
        ("engine.zero_stage=7", "must be one of 1, 2 or 3, for example engine.zero_stage=1"),
        # syntax
        ("foo", "'foo' is not key=value: write it as train.steps=20, for example"),
        ("=3", "'=3': '' is not a dotted key: write it as train.steps=20"),
        ("train..steps=3", "'train..steps' is not a dotted key: write it as train.steps=20"),
        ("train.seed=", "train.seed= has no value: give one after the equals sign"),
        # combinations
        ("train.steps=5", "schedule.warmup_steps=10 must be less than train.steps=5: set schedule.warmup_steps=0"),
        ("train.micro_batch_size=7", "train.global_batch_size=64 must be a multiple of train.micro_batch_size=7"),
        ("schedule.name=wsd", "schedule.decay_steps=0 must be between 1 and train.steps - warmup_steps = 990"),
        ("schedule.decay_steps=5", "belongs to the wsd schedule: drop it or set schedule.name='wsd'"),
        ("optimizer.betas=[1, 0.9]", "optimizer.betas=[1.0, 0.9] must lie in [0, 1)"),
        (
            "data.seq_len=32",
            "data.seq_len=32 is shorter than model.mamba2.chunk_size=64: set model.mamba2.chunk_size=32",
        ),
        ("engine.overlap_comm=true", "engine.overlap_comm=true needs engine.zero_stage=2 or 3: stage 1 reduces"),
        ("data.held_out=tokens/a", "data.held_out=tokens/a is also in data.train"),
        ("train.eval_every=5", "train.eval_every needs data.held_out: name a held-out token store"),
        ("data.train=[]", "data.train is empty: name a token store (write one with `riverrun data prepare`)"),
        ("model.mamba2.head_dim=48", "model.mamba2.head_dim=48 must divide mamba2.expand × hidden_size = 64; try "),
        ("model.attention.head_dim=0", "model.attention.head_dim=0 must be positive; 64 is usual"),
        ('model.layer_pattern=["mamba3"]', "layer_pattern names an unknown mixer 'mamba3'; choose from attention"),
        ("model.layer_pattern=[]", "layer_pattern is empty; name at least one of"),
        ("model.num_hidden_layers=1", "layer_pattern has 2 entries but num_hidden_layers=1"),
    ],
)
def test_each_error_names_the_key_and_the_fix(recipe_file, override, message):
    assert message in the_problem(recipe_file(), override)


def test_every_problem_is_listed_at_once(recipe_file):
    source = recipe_file(BASE + "eval_evry = 3\n[train]\nsteps = 'x'\n[log]\nwandb = 'no'\n")
    found = problems(source, "foo", "optimizer.lr=-1", "model.mamba2.head_dim=48", "data.seq_len=32")
    assert len(found) == 7
    for part in (
        "'foo'",
        "schedule.eval_evry",
        'train.steps="x"',
        "log.wandb=",
        "optimizer.lr=-1",
        "head_dim=48",
        "seq_len=32",
    ):
        assert sum(part in p for p in found) == 1, part
    assert sum(f"(recipe {source})" in p for p in found) == 3
    with pytest.raises(ValueError, match="has 7 problems"):
        load_recipe(source, ["foo", "optimizer.lr=-1", "model.mamba2.head_dim=48", "data.seq_len=32"])


def test_a_wrong_value_causes_no_second_problem(recipe_file):
    # train.steps falls back to its default while it is wrong: nothing may be said about the schedule then
    assert "train.stpes" in the_problem(recipe_file(), "train.stpes=5000", "schedule.warmup_steps=2000")
    assert "data.train[0].path" in the_problem(recipe_file(), "data.train=[{path=1}]")


def test_toml_syntax_errors_name_the_line(recipe_file):
    source = recipe_file("[train]\nsteps = \n")
    message = the_problem(source)
    assert f"{source}, line 2 is not TOML" in message and "'steps ='" in message and "quotes" in message
    assert "line 1 is not TOML" in the_problem(recipe_file("[train"))
    assert "UTF-8" in the_problem_of_bytes(recipe_file)


def the_problem_of_bytes(recipe_file):
    source = recipe_file()
    with open(source, "wb") as file:
        file.write(b'name = "\xff"')
    return the_problem(source)


def test_a_recipe_without_data_can_be_shown_but_not_run(recipe_file):
    source = recipe_file(BASE.replace('train = "tokens/a"', ""))
    loaded = load_recipe(source, require_inputs=False)
    assert len(loaded.missing) == 1 and loaded.missing[0].startswith("data.train is empty")
    assert the_problem(source) == loaded.missing[0]
    assert "data.train is empty" not in "".join(problems(source, "train.steps=5", require_inputs=False))


def test_options_of_mixers_outside_the_pattern_are_accepted(recipe_file):
    loaded = load_recipe(recipe_file(), ["model.gated_delta.num_householder=2"])
    assert loaded.recipe.model.gated_delta.num_householder == 2
    assert "model.gated_delta.num_householder" in unused(loaded.recipe)
    assert not any(key.startswith(("model.mamba2.", "model.attention.")) for key in unused(loaded.recipe))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.attention.window=16", "log.peak_tflops=989.5", "optimizer.lr=1e-5", "train.z_loss=1e-20"],
        ["model.gated_delta.num_householder=3", "model.layer_pattern=['gated_delta','attention']"],
        ["model.para_gru.expand=2.0"],
        [
            'data.train=[{path="a b", weight=0.5}, "c\'d"]',
            r'data.held_out="tab\t, \"quote\", back\\slash, ñ 😀 \u007f"',
        ],
    ],
)
def test_toml_round_trip(recipe_file, overrides):
    first = load_recipe(recipe_file(), overrides).recipe
    text = to_toml(first)
    again = load_recipe(recipe_file(text, "config.toml"))
    assert again.recipe == first
    assert to_toml(again.recipe) == text
    assert "derived" not in again.origins.values() or all(
        key in unused(first) for key, origin in again.origins.items() if origin == "derived"
    )


def test_round_trip_of_defaults(recipe_file):
    first = Recipe(data={"train": [{"path": "a"}]})
    assert load_recipe(recipe_file(to_toml(first))).recipe == first.model_copy(update={"model": first.model.resolve()})


def test_mixers_that_no_layer_uses_are_not_written(recipe_file):
    text = to_toml(load_recipe(recipe_file(), ["model.para_gru.expand=2.0"]).recipe)
    assert re.findall(r"\[model\.(\w+)\]", text) == ["attention", "mamba2", "para_gru"]


def test_difference(recipe_file):
    a = load_recipe(recipe_file()).recipe
    b = load_recipe(
        recipe_file(),
        ["train.steps=20", "model.attention.window=8", "name=other", "log.wandb=true", "model.para_gru.expand=2.0"],
    ).recipe
    assert difference(a, a) == []
    assert difference(a, b) == [
        "model.attention.window: unset there, 8 here",
        "train.steps: 1000 there, 20 here",
        "log.wandb: false there, true here",
    ]
    assert difference(a, b, ignore=("log", "model", "train.steps")) == ['name: "tiny" there, "other" here']
