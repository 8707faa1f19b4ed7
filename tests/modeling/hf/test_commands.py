"""`riverrun export` and `riverrun import` as functions: what they write, print and refuse."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import hybrid, mamba2, randomised, save_tokenizer
from transformers import AutoModelForCausalLM

import riverrun.train.checkpoint
from riverrun.launch.commands.export import export, import_
from riverrun.modeling.hf.importer import load_pretrained


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder without checkpoints; its weights come from memory."""

    def make(options):
        model = randomised(options)
        model.config.save_pretrained(tmp_path / "run")
        save_tokenizer(tmp_path / "run" / "tokenizer")
        asked = []

        def load_weights(run_dir, step=None):
            asked.append((run_dir, step))
            return dict(model.named_parameters())

        monkeypatch.setattr(riverrun.train.checkpoint, "load_weights", load_weights)
        return model, tmp_path / "run", asked

    return make


def test_export_and_import_of_a_run(run, tmp_path, capsys):
    model, run_dir, asked = run(mamba2())
    export(run_dir, tmp_path / "hf", step=20)
    assert asked == [(run_dir, 20)]
    printed = capsys.readouterr().out
    total = sum(p.numel() for p in model.parameters())
    assert "Mamba2ForCausalLM" in printed and f"{total / 1e3:.3g}k parameters" in printed
    assert f'from_pretrained("{tmp_path / "hf"}")' in printed and "trust_remote_code" not in printed
    import_(tmp_path / "hf", tmp_path / "back")
    printed = capsys.readouterr().out
    assert "RiverrunForCausalLM" in printed and "trust_remote_code=True" in printed
    ids = torch.arange(20)[None]
    loaded = load_pretrained(tmp_path / "back")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generation_config.eos_token_id == 1
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_dtype_and_target(run, tmp_path):
    model, run_dir, _ = run(mamba2())
    export(run_dir, tmp_path / "native", dtype="bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "native").lm_head.weight.dtype == torch.bfloat16
    export(run_dir, tmp_path / "own", target="riverrun")
    stored = load_file(tmp_path / "own" / "model.safetensors")
    assert all(torch.equal(stored[name], p) for name, p in model.named_parameters())


def test_refusals_come_before_the_weights_are_read(run, tmp_path):
    _, run_dir, asked = run(hybrid())
    with pytest.raises(ValueError, match="cannot be written as Mamba2ForCausalLM"):
        export(run_dir, tmp_path / "hf", target="mamba2")
    with pytest.raises(ValueError, match="exists already"):
        export(run_dir, run_dir)
    with pytest.raises(ValueError, match="there is no run folder"):
        export(tmp_path / "nothing", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"there is no .*config.json"):
        export(tmp_path, tmp_path / "hf")
    assert not asked
