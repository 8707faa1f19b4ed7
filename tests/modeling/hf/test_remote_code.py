"""Exports with their own code: used in a fresh interpreter that cannot import riverrun, and in one that has."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import hybrid, randomised, save_tokenizer

import riverrun
from riverrun.modeling.hf import remote_code
from riverrun.modeling.hf.export import export_model
from riverrun.modeling.hf.importer import import_model, load_pretrained

ROOT = Path(riverrun.__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return randomised(hybrid())


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    tokenizer = save_tokenizer(folder / "tokenizer")
    name = export_model(model.config, model.state_dict(), folder / "out", tokenizer_dir=folder / "tokenizer")
    assert name == "RiverrunForCausalLM"
    return folder / "out", tokenizer


@pytest.mark.parametrize("where", ["blocked", str(ROOT)], ids=["without_riverrun", "with_riverrun"])
def test_stranger_loads_and_generates(where, model, exported, tmp_path):
    folder, tokenizer = exported
    command = [sys.executable, "-I", str(Path(__file__).with_name("remote_session.py")), str(folder)]
    subprocess.run(
        [*command, str(tmp_path / "results.pt"), where],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    found = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        expected = model(torch.arange(3, 53).view(2, 25)).logits
    assert expected.abs().max() > 0.5
    assert torch.equal(found["logits"], expected)
    assert torch.equal(found["again"], expected)
    assert torch.equal(found["beam"], found["beam_no_cache"])
    assert not torch.equal(found["beam"], found["greedy"]), "the beams never crossed: this tested no reordering"
    assert found["eos"] == tokenizer.eos_token_id
    assert set(found["files"]) == set(remote_code.bundle())
    config, weights = import_model(tmp_path / "saved_again")
    assert config.model == model.config.model
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_round_trip(model, exported):
    folder, _ = exported
    config, weights = import_model(folder)
    assert config.model == model.config.model
    expected = dict(model.named_parameters())
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], p) for name, p in expected.items())
    loaded = load_pretrained(folder)
    assert all(
        getattr(p, "no_weight_decay", False) == getattr(expected[name], "no_weight_decay", False)
        for name, p in loaded.named_parameters()
    ), "loading must keep the marks that the optimiser reads"


def test_bundle_is_closed_and_needs_only_torch_and_transformers_to_load():
    files = remote_code.bundle()
    kernels = "kernels_common_triton_solve.py"
    assert {"modeling_model.py", "modeling_mixers_para.py", "kernels_ssd.py", kernels} <= set(files)
    for name, source in files.items():
        tree = ast.parse(source, name)
        hidden = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files, f"{name}: {node.module}"
            elif isinstance(node, ast.ImportFrom) and node not in hidden:
                assert node.module.split(".")[0] in remote_code.AVAILABLE, f"{name}: {node.module}"


@pytest.mark.parametrize(
    "line",
    ["import riverrun.kernels.ssd", "from riverrun.kernels.ssd import chunked", "from riverrun.train.loop import run",
     "from . import x", "from riverrun import kernels"],
)  # fmt: skip
def test_imports_that_cannot_be_made_flat_are_refused(line):
    with pytest.raises(ValueError, match="m, line 2"):
        remote_code._rewrite("m", f"import torch\n{line}\n")


def test_imports_of_other_packages_are_hidden_from_transformers(tmp_path):
    from transformers.dynamic_module_utils import get_imports

    source = "import triton\n\ndef f():\n    from triton.language import (\n        dot,\n    )\n    return dot\n"
    rewritten, _ = remote_code._rewrite("m", source)
    (tmp_path / "m.py").write_text(rewritten)
    assert get_imports(tmp_path / "m.py") == []
    modules = [node for node in ast.walk(ast.parse(rewritten)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(modules) == 2
