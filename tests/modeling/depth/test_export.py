"""Models of recurrent depth on disk: as they are, with their code for transformers, and not as classes of its own."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.hf import remote_code
from riverrun.modeling.hf.export import export_model, resolve_target
from riverrun.modeling.hf.importer import import_model, load_pretrained
from riverrun.modeling.mixer_options import AttentionOptions
from riverrun.modeling.model import RiverrunForCausalLM
from tests.modeling.depth.shapes import DEPTH
from tests.modeling.hf import tiny_models
from tests.modeling.hf.tiny_models import randomised, save_tokenizer

LOOPED = replace(
    tiny_models.hybrid(), num_hidden_layers=4, layer_pattern=("attention", "gated_delta", "mamba2", "attention"),
    scale_embedding=True, sandwich_norm=True, attention=AttentionOptions(num_heads=4, head_dim=8, qk_bias=True),
)  # fmt: skip
SHAPES = {
    injection: replace(LOOPED, depth=replace(DEPTH, mean_recurrence=3, injection=injection))
    for injection in ("linear", "diagonal")
}
IDS = torch.arange(3, 53).view(2, 25)
SESSION = Path(tiny_models.__file__).with_name("remote_session.py")


@pytest.fixture(params=SHAPES)
def model(request) -> RiverrunForCausalLM:
    return randomised(SHAPES[request.param])


@torch.no_grad()
def test_saved_models_are_loaded_as_they_were(model, tmp_path):
    expected = model(IDS).logits
    assert not torch.allclose(model(IDS, num_steps=2).logits, expected, rtol=1e-2)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(RiverrunForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits, expected)
    export_model(model.config, model.state_dict(), tmp_path / "out", dtype=torch.bfloat16)
    config, weights = import_model(tmp_path / "out")
    assert config.model == model.config.model
    for name, p in load_pretrained(tmp_path / "out").named_parameters():
        kept = getattr(p, "keep_fp32", False)
        assert kept == name.endswith(("A_log", "dt_bias", ".D")) and p.dtype == (
            torch.float32 if kept else torch.bfloat16
        )
        assert torch.equal(weights[name], p), name


@pytest.mark.parametrize("model", ["diagonal"], indirect=True)
@torch.no_grad()
def test_transformers_loads_and_generates_where_riverrun_is_not_installed(model, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "out"
    name = export_model(model.config, model.state_dict(), folder, tokenizer_dir=tmp_path / "tokenizer")
    assert name == "RiverrunForCausalLM"
    subprocess.run(
        [sys.executable, "-I", str(SESSION), str(folder), str(tmp_path / "results.pt"), "blocked"],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    found = torch.load(tmp_path / "results.pt")
    assert torch.equal(found["logits"], model(IDS).logits) and torch.equal(found["again"], found["logits"])
    assert torch.equal(found["beam"], found["beam_no_cache"])
    assert set(found["files"]) == set(remote_code.bundle())


def test_native_classes_are_refused():
    plain = tiny_models.mamba2()
    assert resolve_target(RiverrunConfig.from_options(plain)) == "mamba2"
    for change, reason in (
        ({"depth": DEPTH}, "runs every layer once"),
        ({"sandwich_norm": True}, "sandwich_norm=false"),
        ({"scale_embedding": True}, "scale_embedding=false"),
    ):
        config = RiverrunConfig.from_options(replace(plain, num_hidden_layers=4, **change))
        assert resolve_target(config) == "riverrun"
        with pytest.raises(ValueError, match=reason):
            resolve_target(config, "mamba2")
    biased = tiny_models.with_options(tiny_models.olmo(), "attention", qk_bias=True)
    assert resolve_target(RiverrunConfig.from_options(tiny_models.olmo())) == "olmo_hybrid"
    with pytest.raises(ValueError, match="qk_bias=false"):
        resolve_target(RiverrunConfig.from_options(biased), "olmo_hybrid")
