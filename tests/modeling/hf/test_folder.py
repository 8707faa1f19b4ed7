"""What is written and refused: whole folders or none, tokenizers, shards, and clear messages for everything else."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, mamba2, randomised, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import riverrun
from riverrun.modeling.hf.export import export_model
from riverrun.modeling.hf.importer import import_model, load_pretrained
from riverrun.modeling.model import RiverrunForCausalLM

ROOT = Path(riverrun.__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return randomised(mamba2())


def test_tokenizer_comes_along(model, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_evil.py").write_text("raise SystemExit\n")
    export_model(model.config, model.state_dict(), tmp_path / "out", tokenizer_dir=tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("w5 w63")["input_ids"] == tokenizer("w5 w63")["input_ids"] == [5, 63]
    for config in (
        GenerationConfig.from_pretrained(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").config,
        load_pretrained(tmp_path / "out").generation_config,
    ):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert not list((tmp_path / "out").glob("*.py"))


def test_tokenizer_of_another_vocabulary(model, tmp_path):
    save_tokenizer(tmp_path / "tokenizer", VOCAB + 1)
    with pytest.raises(ValueError, match="has 65 tokens, the model only 64"):
        export_model(model.config, model.state_dict(), tmp_path / "out", tokenizer_dir=tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="no tokenizer files"):
        export_model(model.config, model.state_dict(), tmp_path / "out", tokenizer_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize("target", ["riverrun", "mamba2"])
def test_shards(target, model, tmp_path):
    export_model(model.config, model.state_dict(), tmp_path / "out", target=target, max_shard_size=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 25_000 for path in files)
    _, weights = import_model(tmp_path / "out")
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    loader = AutoModelForCausalLM.from_pretrained if target == "mamba2" else RiverrunForCausalLM.from_pretrained
    loaded = loader(tmp_path / "out").eval()
    ids = torch.arange(10)[None]
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {files[1].name}"):
        import_model(tmp_path / "out")


def test_existing_folder_is_refused(model, tmp_path):
    (tmp_path / "out").mkdir()
    export_model(model.config, model.state_dict(), tmp_path / "out")  # an empty one is fine
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="exists already: choose another folder"):
        export_model(model.config, model.state_dict(), tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == before


def test_weights_that_do_not_fit_leave_nothing(model, tmp_path):
    weights = dict(model.state_dict())
    del weights["model.norm.weight"]
    weights["model.layers.1.mixer.D"] = torch.ones(3)
    weights["extra"] = torch.ones(1)
    with pytest.raises(ValueError) as error:
        export_model(model.config, weights, tmp_path / "out")
    for problem in ("missing tensor model.norm.weight", "unexpected tensor extra", "mixer.D has shape (3,)"):
        assert problem in str(error.value)
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, os, signal, torch
sys.path[:0] = [{root!r}, {here!r}]
from tiny_models import mamba2, randomised
from riverrun.modeling.hf.export import export_model
model = randomised(mamba2())
class Deadly(dict):
    def __getitem__(self, name):
        if name.startswith("model.layers.2") and os.path.exists({partial!r} + "/config.json"):
            if list(filter(lambda f: "safetensors" in f, os.listdir({partial!r}))):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(name)
export_model(model.config, Deadly(model.state_dict()), {out!r}, max_shard_size=20_000)
"""


def test_killed_in_the_middle(model, tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    script = KILLED.format(root=str(ROOT), here=str(Path(__file__).parent), out=str(out), partial=str(partial))
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert partial.exists() and not out.exists()
    export_model(model.config, model.state_dict(), out)  # clears the rest away
    assert out.exists() and not partial.exists()


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(path) | tensors
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def test_refused_folders(model, tmp_path):
    out = tmp_path / "out"
    export_model(model.config, model.state_dict(), out)
    config = json.loads((out / "config.json").read_text())

    def write(values):
        (out / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))

    for values, message in (
        ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM, .*Mamba2ForCausalLM, OlmoHybrid"),
        ({}, "architecture None"),
        ("{", "not valid JSON"),
        ({"architectures": ["RiverrunForCausalLM"]}, "not written by Riverrun"),
        (config | {"num_hidden_layers": "three"}, "num_hidden_layers"),
        (config | {"state_size": 32}, r"in_proj.weight has shape \(168, 32\), the config asks for \(200, 32\)"),
        (config | {"num_hidden_layers": 2}, r"unexpected tensor backbone.layers.2.mixer.A_log"),
    ):
        write(values)
        with pytest.raises(ValueError, match=message):
            import_model(out)
    write(config)
    weights = out / "model.safetensors"
    change(weights, **{"backbone.layers.1.mixer.D": None})
    with pytest.raises(ValueError, match=r"missing tensor backbone.layers.1.mixer.D"):
        import_model(out)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        import_model(out)
    weights.rename(out / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pickle \(pytorch_model.bin\).*save_pretrained"):
        import_model(out)
    (out / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors"):
        import_model(out)
    with pytest.raises(ValueError, match=r"there is no .*config.json"):
        import_model(tmp_path)


def test_no_code_from_the_folder_runs(model, tmp_path):
    out = tmp_path / "out"
    export_model(model.config, model.state_dict(), out, target="riverrun")
    for path in out.glob("*.py"):
        path.write_text("raise SystemExit('code from the folder ran')\n")
    ids = torch.arange(10)[None]
    assert torch.equal(load_pretrained(out)(ids).logits, model(ids).logits)


def test_tied_weights_under_both_names(tmp_path):
    model = randomised(mamba2(tied=True))
    weights = dict(model.state_dict())
    assert "lm_head.weight" in weights
    export_model(model.config, weights, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    change(tmp_path / "out" / "model.safetensors", **{"lm_head.weight": embedding.clone()})
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding"):
        export_model(model.config, weights | {"lm_head.weight": embedding + 1}, tmp_path / "other")
