"""Universal Transformers in use: exported, loaded again, compiled."""

import copy
import functools
from unittest import mock

import pytest
import torch

from riverrun.modeling.hf.export import export_model, resolve_target
from riverrun.modeling.hf.importer import load_pretrained
from riverrun.modeling.hf.remote_code import bundle
from riverrun.modeling.model import RiverrunForCausalLM
from tests.modeling.depth.test_universal import build, options
from tests.modeling.test_model import tokens


def test_exports_compute_the_same(tmp_path):
    model, ids = build(options("attention", "mamba2"), torch.float32), tokens(2, 9)
    assert export_model(model.config, model.state_dict(), tmp_path / "out") == "RiverrunForCausalLM"
    assert {"modeling_depth_universal.py", "modeling_depth_halting.py"} <= set(bundle())
    for loaded in (load_pretrained(tmp_path / "out"), RiverrunForCausalLM.from_pretrained(tmp_path / "out").eval()):
        assert loaded.config.options == model.config.options
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_classes_that_run_every_layer_once_are_no_target():
    mamba = options("mamba2", model={"intermediate_size": 0})
    config = build(mamba).config
    assert resolve_target(config) == "riverrun"
    with pytest.raises(ValueError, match="the class runs every layer once"):
        resolve_target(config, "mamba2")


def test_compiled_blocks_train_alike():
    """Traced as they are when compiled, but left to torch's own kernels."""
    plain = build(options("attention", "mamba2"), torch.float32).train()
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        compiled.compile_blocks()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    ids = tokens(2, 20)
    for bounds in ([0, 5, 20, 31, 40], [0, 20, 22, 24, 40]):
        losses = []
        for model in (plain, compiled):
            model.set_recompute(True)
            out = model(ids, targets=ids.flip(1), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
            out.loss.backward()
            losses.append(out.loss)
        torch.testing.assert_close(*losses)
        for p, q in zip(plain.parameters(), compiled.parameters()):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
