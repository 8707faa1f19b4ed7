"""torch.compile changes speed, not results, also when the documents of the batches change."""

import copy

import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.mixer_options import AttentionOptions, Mamba2Options
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions


def test_compiled_blocks_train_alike():
    options = ModelOptions(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        layer_pattern=("mamba2", "attention"),
        attention=AttentionOptions(head_dim=16),
        mamba2=Mamba2Options(head_dim=16, state_size=8, chunk_size=8),
    )
    plain = RiverrunForCausalLM(RiverrunConfig.from_options(options)).train()
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for model in (plain, compiled):
        model.set_recompute(True)
    ids = torch.randint(0, 50, (2, 20))
    for bounds in ([0, 5, 20, 31, 40], [0, 20, 22, 24, 40]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        losses = [model(ids, targets=ids, cu_seqlens=cu_seqlens).loss for model in (plain, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for p, q in zip(plain.parameters(), compiled.parameters()):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
