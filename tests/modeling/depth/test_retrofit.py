"""Trained layers as prelude, core and coda: the same logits before any training, and what cannot be cut."""

import math
from dataclasses import replace

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.depth.retrofit import ADAPTER, Parts, prelude_rms, retrofit
from riverrun.modeling.hf.importer import build_model
from riverrun.modeling.hf.weights import parameters_of
from riverrun.modeling.mixer_options import AttentionOptions, GatedDeltaOptions, Mamba2Options
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions

HYBRID = ("attention", "mamba2", "gated_delta")
DEPTH = DepthOptions(mean_recurrence=3, backprop_depth=2)


def trained(pattern=HYBRID, layers=6, **changes):
    """A model whose weights are all random, norms too."""
    options = ModelOptions(
        vocab_size=48, hidden_size=32, num_hidden_layers=layers, layer_pattern=pattern, intermediate_size=40,
        attention=AttentionOptions(head_dim=8, num_kv_heads=2), mamba2=Mamba2Options(head_dim=8, state_size=8),
        gated_delta=GatedDeltaOptions(num_heads=2, head_dim=8), **changes,
    )  # fmt: skip
    model = RiverrunForCausalLM(RiverrunConfig.from_options(options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            elif p.dim() == 2:
                p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1]))
    return model


def made(model, *parts, depth=DEPTH):
    config, weights = retrofit(model.config, dict(model.named_parameters()), Parts.parse(*parts), depth)
    assert set(weights) == set(parameters_of(config)) and len(weights) == len(set(weights))
    return build_model(config, weights)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "scale_embedding": True},
        {"sandwich_norm": True},
        {"pattern": ("attention",), "post_norm_attention": True},
    ],
)
@pytest.mark.parametrize("parts", [("0-1", "2-4", "5"), ("0", "1-5", ""), ("", "0-3", "4-5"), ("", "0-5", "")])
@torch.no_grad()
def test_all_layers_kept_give_the_same_logits_bit_for_bit(parts, changes):
    model, ids = trained(**changes), torch.randint(0, 48, (2, 13))
    new, expected = made(model, *parts), model(ids).logits
    assert expected.std() > 0.3
    for steps in (None, 1, 4):
        assert torch.equal(new(ids, num_steps=steps).logits, expected), steps
    assert new.config.options.depth == replace(
        DEPTH, prelude_layers=len(Parts.parse(*parts).prelude), coda_layers=len(Parts.parse(*parts).coda),
        norm_core=False,
    )  # fmt: skip


@torch.no_grad()
def test_dropped_layers_are_gone_and_the_others_keep_their_mixers():
    model, ids = trained(layers=8), torch.randint(0, 48, (2, 13))
    new = made(model, "1", "3-4", "6-7")
    kept = [1, 3, 4, 6, 7]
    assert Parts.parse("1", "3-4", "6-7").dropped(8) == [0, 2, 5]
    assert new.config.options.layers == tuple(HYBRID[i % 3] for i in kept)
    everything = model(ids).logits
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    expected = model(ids).logits
    assert torch.equal(new(ids, num_steps=2).logits, expected) and not torch.allclose(expected, everything, atol=0.1)


def test_a_core_of_one_kind_has_a_short_pattern():
    assert made(trained(), "0", "3", "").config.options.layer_pattern == ("attention",)


def test_training_reaches_the_state():
    new = made(trained(), "0", "1-3", "4-5").train()
    targets = torch.randint(0, 48, (2, 13))
    keys = torch.tensor([1, 2])
    new(torch.randint(0, 48, (2, 13)), targets=targets, num_steps=(1, 2), row_keys=keys).loss.backward()
    for name, parameter in new.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    of_state, of_input = new.get_parameter(ADAPTER).grad.chunk(2, dim=1)
    assert of_state.abs().mean() > 0.01 * of_input.abs().mean() > 0


@torch.no_grad()
def test_the_size_of_what_the_prelude_makes():
    model = trained()
    documents = [torch.randint(0, 48, (n,)) for n in (5, 9, 7)]
    found = []
    for tokens in documents:
        outputs = []
        hook = model.model.layers[1].register_forward_hook(lambda module, args, out, to=outputs: to.append(out))
        model(tokens[None])
        hook.remove()
        found += outputs[0].pow(2).mean(-1).sqrt().flatten().tolist()
    new = made(model, "0-1", "2-3", "4-5")
    expected = sorted(found)[len(found) // 2]
    assert len(found) == 21 and math.isclose(prelude_rms(new, documents), expected, rel_tol=1e-5)
    state_std = made(model, "0-1", "2-3", "4-5", depth=replace(DEPTH, state_std=expected))
    layout = new._layout(documents[0][None], None, None, None)
    drawn = state_std.model.initial_state(torch.zeros(1, 5, 2000), layout)
    assert math.isclose(drawn.std(), expected, rel_tol=0.05)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("0-1", "1-3", "4"), "the prelude 0-1 and the core 1-3 share layer 1"),
        (("0-1", "2-4", "4-5"), "the core 2-4 and the coda 4-5 share layer 4"),
        (("4-5", "2-3", ""), "the prelude 4-5 comes after the core 2-3"),
        (("0", "3-4", "1-2"), "the core 3-4 comes after the coda 1-2"),
        (("0", "1-3", "4-6"), "the coda 4-6 goes beyond the model's layers, 0 to 5"),
        (("0-1", "", "2"), "the core has no layers"),
        (("0-1", "3-2", ""), "the core 3-2 ends before it begins: give the first layer first, 2-3"),
        (("0:1", "2", ""), "the prelude '0:1' names no layers"),
        (("0", "-1", ""), "the core '-1' names no layers"),
    ],
)
def test_wrong_ranges(parts, message):
    with pytest.raises(ValueError, match=message):
        made(trained(("attention",)), *parts)


def test_every_problem_is_listed():
    with pytest.raises(ValueError) as error:
        made(trained(("attention",)), "3-4", "2-3", "9")
    assert str(error.value).count("\n  - ") == 2
    assert "share layer 3" in str(error.value) and "coda 9 goes beyond" in str(error.value)


def test_a_model_that_is_recurrent_already():
    new = made(trained(), "0", "1-3", "4-5")
    with pytest.raises(ValueError, match="runs layers several times already"):
        made(new, "0", "1-3", "4-5")
