"""Huginn's checkpoints: logits of an independent writing of its forward, and every name, field and bit both ways."""

import json
import math
from dataclasses import replace

import huginn_reference as reference
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomised, save_tokenizer

import riverrun.train.checkpoint
from riverrun.eval.models import load_model
from riverrun.launch.commands.export import export, import_
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.hf import huginn
from riverrun.modeling.hf.export import export_model, resolve_target
from riverrun.modeling.hf.importer import import_model, load_pretrained
from riverrun.modeling.hf.weights import export_tensor, parameters_of
from riverrun.modeling.mixer_options import AttentionOptions
from riverrun.modeling.options import ModelOptions

SHAPES = {
    "small": {},
    "one head, untied": {"n_heads": 1, "tie_embeddings": False},
    "deeper": {"n_heads": 2, "n_layers": 7, "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 3,
               "n_layers_in_coda": 2, "norm_eps": 1e-3},
    "no bias": {"qk_bias": False, "rope_base": 50_000},
}  # fmt: skip


def write(folder, config, weights):
    """A checkpoint's folder, tied weights once, as transformers writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"} | (
        {} if config.get("tie_embeddings", True) else {"lm_head.weight": weights["lm_head.weight"]}
    )
    save_file(weights, folder / "model.safetensors")
    return folder


def logits_from(model, ids, state, steps):
    """The model's own steps, from a given s_0."""
    body, layout = model.model, model._layout(ids, None, None, None)
    x = body.embed(ids)
    body.prepare_attention(layout, None, x.dtype)
    e = body.run(body.prelude, x, layout)
    for _ in range(steps):
        state = body.core.iterate(state, e, layout)
    return model.lm_head(body.finish(state, layout))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_are_huginns(shape, steps, tmp_path):
    config = reference.config(**SHAPES[shape])
    weights = reference.random_weights(config)
    model = load_pretrained(write(tmp_path / "theirs", config, weights))
    ids = torch.randint(0, config["vocab_size"], (2, 11))
    state = torch.randn(2, 11, config["n_embd"])
    expected = reference.logits(weights, config, ids, state, steps)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_from(model, ids, state, steps), expected, rtol=1e-4, atol=1e-4)
    drawn = model.model.initial_state(state, model._layout(ids, None, None, None))
    expected = reference.logits(weights, config, ids, drawn, steps)
    torch.testing.assert_close(model(ids, num_steps=steps).logits, expected, rtol=1e-4, atol=1e-4)

    weights["freqs_cis"] = huginn._angles(config["block_size"], config["head_dim"], config["rope_base"])
    doubled = {name: tensor.double() for name, tensor in weights.items()}
    expected = reference.logits(doubled, config, ids, state.double(), steps)
    torch.testing.assert_close(logits_from(model.double(), ids, state.double(), steps), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_zero_state_and_the_mean_number_of_iterations(tmp_path):
    config = reference.config(state_init="zero")
    weights = reference.random_weights(config)
    model = load_pretrained(write(tmp_path / "theirs", config, weights))
    ids = torch.randint(0, config["vocab_size"], (1, 9))
    expected = reference.logits(weights, config, ids, torch.zeros(1, 9, config["n_embd"]), config["mean_recurrence"])
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_table_of_angles(tmp_path):
    config = reference.config(block_size=300, rope_base=50_000)
    ours = huginn._angles(300, config["head_dim"], 50_000)
    torch.testing.assert_close(ours, reference.rotary_table(config), rtol=0, atol=3e-5)  # angles up to 300, in fp32


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_bit_for_bit(shape, tmp_path):
    config = reference.config(padding_multiple=16, block_size=48, **SHAPES[shape])
    theirs = write(tmp_path / "theirs", config, reference.random_weights(config))
    ours, weights = import_model(theirs)
    assert set(weights) == set(parameters_of(ours))
    name = export_model(ours, weights, tmp_path / "back", target="huginn")
    assert name == "RavenForCausalLM"
    expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "back"))
    assert set(expected) == set(found)
    for name in set(expected) - {"freqs_cis"}:
        assert torch.equal(expected[name], found[name]), name
    assert found["freqs_cis"].dtype == torch.float32 and found["freqs_cis"].shape == expected["freqs_cis"].shape
    torch.testing.assert_close(found["freqs_cis"], expected["freqs_cis"], rtol=0, atol=1e-5)
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    differing = {key for key in {*config, *fields} if config.get(key) != fields.get(key)}
    assert differing == {"transformers_version", "torch_dtype"}
    assert fields["torch_dtype"] == "float32"

    again, once_more = import_model(tmp_path / "back")
    assert again.model == ours.model and all(torch.equal(once_more[name], weights[name]) for name in weights)


def test_our_model_there_and_back(tmp_path):
    model = randomised(huginn.options_of(reference.config(state_init="zero", sampling_scheme="fixed")))
    export_model(model.config, model.state_dict(), tmp_path / "out", target="huginn", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, t in stored.items() if t.dtype == torch.float32} == {"freqs_cis"}
    assert stored["freqs_cis"].shape == (1, 4096, 1, 4, 2)
    config, weights = import_model(tmp_path / "out")
    assert config.model == model.config.model
    assert config.options.depth.state_std == 0 and config.options.depth.sampling == "fixed"
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter.bfloat16()), name


def test_huginn_itself_by_the_shapes():
    """The published tensors of the paper's model, and their number without any memory."""
    config = RiverrunConfig.from_options(huginn.options_of({"architectures": ["RavenForCausalLM"]}))
    ours = parameters_of(config)
    assert sum(parameter.numel() for parameter in ours.values()) == 3_564_976_800
    h, found = 5280, {}
    for entry in huginn.to_hf(config)[1]:
        found[entry.theirs[0]] = tuple(export_tensor(entry, ours).shape)
    blocks = [f"{part}.{i}" for part, n in (("prelude", 2), ("core_block", 4), ("coda", 2)) for i in range(n)]
    of_block = {f"norm_{i}.weight": (h,) for i in (1, 2, 3, 4)} | {
        "attn.Wqkv.weight": (15840, h), "attn.qk_bias": (2, 1, 55, 96), "attn.proj.weight": (h, h),
        "mlp.fc.weight": (35840, h), "mlp.proj.weight": (h, 17920),
    }  # fmt: skip
    expected = {f"transformer.{block}.{name}": shape for block in blocks for name, shape in of_block.items()}
    assert found == expected | {
        "transformer.wte.weight": (65536, h), "transformer.adapter.weight": (h, 2 * h), "transformer.ln_f.weight": (h,),
        "freqs_cis": (1, 4096, 1, 48, 2),
    }  # fmt: skip
    assert config.options.depth == DepthOptions()
    assert config.options.attention.head_dim == 96 and config.options.norm_eps == 1e-6


def test_training_names_tied_duplicates_and_no_table(tmp_path):
    config = reference.config()
    weights = reference.random_weights(config)
    expected = import_model(write(tmp_path / "plain", config, weights))[1]
    prefixed = {f"_orig_mod._original_module.{name}": tensor for name, tensor in weights.items()}
    del prefixed["_orig_mod._original_module.freqs_cis"], prefixed["_orig_mod._original_module.lm_head.weight"]
    prefixed["_orig_mod._original_module.lm_head.weight"] = weights["lm_head.weight"].clone()
    found = import_model(write(tmp_path / "prefixed", config, prefixed))[1]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    rounded = weights | {"freqs_cis": weights["freqs_cis"].bfloat16()}
    import_model(write(tmp_path / "rounded", config, rounded))


def test_names_that_stand_for_others():
    config = reference.config()
    aliases = {"num_attention_heads": "n_heads", "hidden_size": "n_embd", "num_hidden_layers": "n_layers"}
    renamed = {name: value for name, value in config.items() if name not in aliases.values()}
    renamed |= {alias: config[name] for alias, name in aliases.items()}
    assert huginn.options_of(renamed) == huginn.options_of(config)
    with pytest.raises(ValueError, match="hidden_size=48: by the other fields it is 24"):
        huginn.options_of(config | {"hidden_size": 48})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"freqs_cis": torch.zeros(1, 32, 1, 4, 2)}, "other angles than rope_base=300"),
        ({"freqs_cis": torch.zeros(32, 4)}, "other angles"),
        ({"lm_head.weight ": torch.zeros(40, 24)}, "unexpected tensor lm_head.weight "),
        ({"_orig_mod._original_module.lm_head.weight": torch.zeros(40, 24)}, "lm_head.weight differs from"),
        ({"transformer.prelude.0.attn.qk_bias": torch.zeros(2, 1, 8, 3)}, r"qk_bias has shape \(2, 1, 8, 3\).*1, 3, 8"),
        ({"transformer.coda.0.attn.Wqkv.weight": torch.zeros(24, 72)}, r"Wqkv.weight has shape \(24, 72\)"),
    ],
)
def test_tensors_that_do_not_fit(changed, message, tmp_path):
    config = reference.config()
    with pytest.raises(ValueError, match=message):
        import_model(write(tmp_path / "theirs", config, reference.random_weights(config) | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"injection_type": "add"}, "injection_type='add': ours is 'linear'"),
        ({"block_class_name": "TransformerPreNormBlock"}, "ours is 'SandwichBlock'"),
        ({"norm_class_name": "LayerNorm"}, "ours is 'RMSNorm_llama'"),
        ({"mlp_class_name": "BaseMLP"}, "ours is 'GatedMLP'"),
        ({"nonlin_name": "GELU"}, "ours is 'SiLU'"),
        ({"bias": True}, "bias=True"),
        ({"test_time_noise": 0.1}, "test_time_noise=0.1"),
        ({"init_strategy": "scaled"}, "ours is 'takase'"),
        ({"state_init": "unit"}, "ours is one of like-init, zero"),
        ({"sampling_scheme": "geometric"}, "only matters in training"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1: by the other fields it is 3"),
        ({"n_layers": 9}, "n_layers=9: by the other fields it is 4"),
        ({"padded_vocab_size": 64}, "padded_vocab_size=64"),
        ({"init_values": {"embed_scale": 1.0}}, "init_values.embed_scale=1.0: of n_embd=24 it is 4.89"),
        ({"n_heads": 5, "num_key_value_heads": 5, "head_dim": 4}, "n_heads=5 does not divide n_embd=24"),
        ({"iter_injection": "add"}, "unknown fields iter_injection: delete them"),
    ],
)
def test_what_our_model_cannot_compute_is_not_imported(changed, message, tmp_path):
    config = reference.config() | changed
    with pytest.raises(ValueError, match=message) as error:
        import_model(write(tmp_path / "theirs", config, reference.random_weights(reference.config())))
    assert "this RavenForCausalLM cannot be imported" in str(error.value)


FITTING = ModelOptions(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, layer_pattern=("attention",), sandwich_norm=True,
    scale_embedding=True, attention=AttentionOptions(head_dim=8, qk_bias=True), depth=DepthOptions(1, 1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "of_attention", "of_depth", "reasons"),
    [
        ({"depth": None}, {}, {}, ["has no model.depth"]),
        ({"layer_pattern": ("attention", "mamba2")}, {}, {}, ["also has mamba2"]),
        (
            {"sandwich_norm": False, "scale_embedding": False, "intermediate_size": 0}, {}, {},
            ["sandwich_norm=true", "scale_embedding=true", "intermediate_size=0"],
        ),
        (
            {}, {"num_heads": 2, "num_kv_heads": 1, "window": 4, "rope": False, "qk_norm": "head"}, {},
            ["num_kv_heads=1", "= hidden_size", "window=4", "rope=true", 'qk_norm="head"'],
        ),
        (
            {}, {}, {"injection": "diagonal", "state_std": 0.5, "sigma": 0.7, "norm_core": False},
            ["injection", "depth.state_std", "depth.sigma", "norm_core=true"],
        ),
    ],
)  # fmt: skip
def test_every_reason_is_listed(changes, of_attention, of_depth, reasons):
    options = replace(FITTING, attention=replace(FITTING.attention, **of_attention))
    options = replace(options, depth=replace(FITTING.depth, **of_depth))
    config = RiverrunConfig.from_options(replace(options, **changes))
    with pytest.raises(ValueError, match="cannot be written as RavenForCausalLM; use target riverrun") as error:
        resolve_target(config, "huginn")
    for reason in reasons:
        assert reason in str(error.value)
    assert str(error.value).count("\n") >= len(reasons)


def test_it_is_written_only_if_asked_for():
    config = RiverrunConfig.from_options(FITTING)
    assert resolve_target(config, "huginn") == "huginn"
    assert resolve_target(config) == "riverrun"


def test_commands(tmp_path, monkeypatch, capsys):
    model = randomised(FITTING)
    run = tmp_path / "run"
    model.config.save_pretrained(run)
    (run / "config.toml").write_text("[data]\nseq_len = 24\n")
    save_tokenizer(run / "tokenizer")
    monkeypatch.setattr(riverrun.train.checkpoint, "load_weights", lambda *_: dict(model.named_parameters()))
    export(run, tmp_path / "theirs", target="huginn")
    printed = capsys.readouterr().out
    assert "RavenForCausalLM" in printed and "trust_remote_code=True" in printed
    assert "copy raven_config_minimal.py and raven_modeling_minimal.py" in printed
    fields = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (fields["model_type"], fields["block_size"], fields["eos_token_id"]) == ("huginn_raven", 24, 1)
    assert math.isclose(fields["init_values"]["embed_scale"], math.sqrt(32))
    assert "tie_word_embeddings" not in fields, "their class would be given it twice"

    import_(tmp_path / "theirs", tmp_path / "back")
    assert "RiverrunForCausalLM" in capsys.readouterr().out
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        for folder in ("theirs", "back"):
            loaded = load_model(tmp_path / folder, device="cpu")
            assert loaded.is_riverrun and torch.equal(loaded.model(ids).logits, expected), folder
            assert loaded.require_tokenizer().eos_id == 1
