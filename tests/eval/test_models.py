"""What can be loaded for evaluation, and what is told when it cannot."""

import json

import pytest
import torch
from eval_examples import hybrid

from riverrun.eval.models import load_model, resolve_device
from riverrun.modeling.hf.export import export_model
from riverrun.train.data.tokenizer import ByteTokenizer

IDS = torch.arange(20)[None]


def test_a_model_folder(saved):
    loaded = load_model(saved)
    assert loaded.is_riverrun and not loaded.model.training and loaded.seq_len is None
    assert torch.equal(loaded.model(IDS).logits, hybrid()(IDS).logits)
    assert loaded.require_tokenizer().fingerprint == ByteTokenizer.fingerprint
    assert loaded.vocab_size == 258 and loaded.device.type == "cpu" and loaded.dtype == torch.float32
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_an_export_keeps_its_tokenizers_fingerprint(saved, tmp_path):
    model = hybrid()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    export_model(model.config, weights, tmp_path / "out", tokenizer_dir=saved)
    loaded = load_model(tmp_path / "out")
    assert loaded.is_riverrun and loaded.tokenizer.fingerprint == ByteTokenizer.fingerprint
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


def test_dtypes(saved):
    loaded = load_model(saved, dtype="bf16")
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.model.layers[0].mixer.A_log.dtype == torch.float32


def test_fingerprints_tell_weights_apart(saved, tmp_path):
    first, again = load_model(saved).fingerprint, load_model(saved).fingerprint
    model = hybrid()
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    assert first == again != load_model(tmp_path / "other").fingerprint


def test_a_foreign_model(foreign):
    from transformers import AutoModelForCausalLM

    loaded = load_model(foreign)
    expected = AutoModelForCausalLM.from_pretrained(foreign)(IDS).logits
    assert torch.equal(loaded.model(IDS).logits, expected) and not loaded.is_riverrun


def test_code_in_a_folder_runs_only_if_trusted(foreign):
    config = json.loads((foreign / "config.json").read_text())
    config |= {
        "architectures": ["Strange"],
        "model_type": "strange",
        "auto_map": {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.Strange"},
    }
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "strange.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(foreign / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
        "class Strange(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load_model(foreign)
    assert not (foreign / "ran").exists()
    assert load_model(foreign, trust_remote_code=True).model(IDS).logits.isfinite().all()
    assert (foreign / "ran").exists()


def test_what_cannot_be_loaded(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"there is no folder .*none/at/all, and no model"):
        load_model("none/at/all")
    with pytest.raises(ValueError, match="there is no folder nobody/nothing, and no model"):
        load_model("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a run folder nor a model"):
        load_model(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a run folder"):
        load_model(saved, step=3)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_model(saved)


def test_a_run_without_a_checkpoint(tmp_path):
    hybrid().config.save_pretrained(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        load_model(tmp_path)
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no intact checkpoint to load yet\nskipping checkpoint step_00000002"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of step 7"):
        load_model(tmp_path, step=7)


def test_a_model_without_a_tokenizer(tmp_path):
    hybrid().save_pretrained(tmp_path / "bare")
    loaded = load_model(tmp_path / "bare")
    assert loaded.tokenizer is None
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        loaded.require_tokenizer()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="--device cpu"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto").type == "cuda" and resolve_device("cuda:0").index == 0
    with pytest.raises(ValueError, match="sees 1 CUDA"):
        resolve_device("cuda:1")
