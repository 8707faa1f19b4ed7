"""Model folders in Hugging Face's layout that are damaged or meant ill: told of, and no other file is read."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.hf.export import export_model
from riverrun.modeling.hf.folder import SafetensorsFolder
from riverrun.modeling.hf.importer import import_model, read_config
from riverrun.modeling.hf.weights import parameters_of
from riverrun.modeling.mixer_options import AttentionOptions, GatedDeltaOptions, Mamba2Options
from riverrun.modeling.options import ModelOptions
from tests.fuzz.mutations import altered_json, damaged, runs

MODELS = {
    "riverrun": ModelOptions(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, layer_pattern=("mamba2", "attention"),
        mamba2=Mamba2Options(head_dim=8, state_size=8), attention=AttentionOptions(head_dim=8),
    ),
    "mamba2": ModelOptions(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, layer_pattern=("mamba2",), intermediate_size=0,
        mamba2=Mamba2Options(head_dim=8, state_size=8),
    ),
    "olmo_hybrid": ModelOptions(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, layer_pattern=("gated_delta", "attention"),
        post_norm_attention=True, gated_delta=GatedDeltaOptions(num_heads=2, head_dim=8),
        attention=AttentionOptions(head_dim=8, qk_norm="full"),
    ),
    "huginn": ModelOptions(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, layer_pattern=("attention",), tie_word_embeddings=True,
        sandwich_norm=True, scale_embedding=True, initializer="takase", depth=DepthOptions(1, 1, mean_recurrence=2),
        attention=AttentionOptions(head_dim=8, qk_bias=True),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    config = RiverrunConfig.from_options(MODELS[request.param].resolve())
    weights = {name: torch.zeros(p.shape) for name, p in parameters_of(config).items()}
    out = tmp_path_factory.mktemp("exports") / request.param
    export_model(config, weights, out, target=request.param, max_shard_size=2000)
    import_model(out)
    return out


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def refused_or_read(folder):
    try:
        config, weights = import_model(folder)
    except ValueError as error:
        assert str(folder) in str(error), error
        return 0
    assert weights.keys() == parameters_of(config).keys()
    return 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_tables(folder, name):
    rng, path = random.Random(0), folder / name
    value, accepted = json.loads(path.read_bytes()), 0
    for _ in range(runs(250)):
        path.write_bytes(altered_json(rng, value))
        accepted += refused_or_read(folder)
    assert accepted > 0


def test_damaged_tensors(folder):
    rng, path = random.Random(0), sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    for _ in range(runs(250)):
        path.write_bytes(damaged(rng, header) + content[len(header) :])
        refused_or_read(folder)


def test_a_damaged_config_of_a_run(tmp_path):
    rng = random.Random(0)
    RiverrunConfig.from_options(MODELS["riverrun"].resolve()).save_pretrained(tmp_path)
    value = json.loads((tmp_path / "config.json").read_bytes())
    for _ in range(runs(500)):
        (tmp_path / "config.json").write_bytes(altered_json(rng, value))
        try:
            read_config(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "config.json", "a\0b", 5, None, ["x"]]
)
def test_an_index_names_files_of_its_folder_only(folder, name):
    save_file({"secret": torch.ones(1)}, folder.parent / "secret.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["weight_map"]["secret"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="copy the whole folder again"):
        SafetensorsFolder(folder)
    with pytest.raises(ValueError, match="copy the whole folder again"):
        import_model(folder)


@pytest.mark.parametrize("depth", [10**12, 10**400], ids=["large", "huge"])
def test_layers_that_are_not_there_are_not_built(folder, depth):
    path = folder / "config.json"
    values = json.loads(path.read_bytes())
    values.get("model", values)["num_hidden_layers"] = depth
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"num_hidden_layers=.*more than the"):
        import_model(folder)
