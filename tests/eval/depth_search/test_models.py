"""Chains of real models: against models that are built as the chain, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from eval_examples import exact_hybrid, hybrid
from planted import Planted, loaded
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from riverrun.eval.depth_search.models import Layers
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.model import RiverrunForCausalLM

IDS = torch.randint(0, 250, (3, 11), generator=torch.Generator().manual_seed(1))
SHAPE = {"vocab_size": 258, "hidden_size": 16, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
MIXED = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")


def llama(layers=range(4)):
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, intermediate_size=24, num_hidden_layers=len(layers)))


def qwen2(layers=range(4)):
    return Qwen2ForCausalLM(
        Qwen2Config(
            **SHAPE, **HEADS, intermediate_size=24, num_hidden_layers=len(layers), sliding_window=3,
            use_sliding_window=True, layer_types=[MIXED[i] for i in layers],
        )
    )  # fmt: skip


def gemma3(layers=range(4)):
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE, **HEADS, intermediate_size=24, num_hidden_layers=len(layers), head_dim=8, sliding_window=3,
            layer_types=[MIXED[i] for i in layers],
        )
    )  # fmt: skip


def gpt2(layers=range(4)):
    return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_head=2, n_layer=len(layers), initializer_range=0.2))


def mamba2(layers=range(4)):
    return Mamba2ForCausalLM(
        Mamba2Config(
            **SHAPE, num_hidden_layers=len(layers), num_heads=4, head_dim=8, state_size=6, n_groups=1, chunk_size=4
        )
    )


def riverrun(layers=range(5)):
    options = hybrid().config.options
    pattern = tuple(options.layers[i] for i in layers)
    options = replace(options, layer_pattern=pattern, num_hidden_layers=len(pattern))
    return RiverrunForCausalLM(RiverrunConfig.from_options(options))


MODELS = {"riverrun": riverrun, "llama": llama, "qwen2": qwen2, "gemma3": gemma3, "gpt2": gpt2, "mamba2": mamba2}
LISTS = {"gpt2": "transformer.h", "mamba2": "backbone.layers"}


def built_as(name, chain, base):
    """A model of its own whose layers are those of the chain."""
    made, prefix = MODELS[name](chain).eval(), LISTS.get(name, "model.layers")
    weights = {key: value for key, value in base.state_dict().items() if not key.startswith(f"{prefix}.")}
    for place, i in enumerate(chain):
        layer = base.get_submodule(f"{prefix}.{i}").state_dict()
        weights |= {f"{prefix}.{place}.{key}": value for key, value in layer.items()}
    made.load_state_dict(weights)
    return made


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return request.param, MODELS[request.param]().eval()


def test_the_identity_is_the_model_bit_by_bit(model):
    _, network = model
    layers = Layers(loaded(network))
    with torch.no_grad():
        expected = network(IDS, use_cache=False).logits
    assert torch.equal(layers.run(tuple(range(len(layers))), IDS), expected)
    assert torch.equal(layers.run(tuple(range(len(layers))), IDS, keep=2), expected[:, -2:])
    with torch.no_grad():  # and leaves it as it was
        assert torch.equal(network(IDS, use_cache=False).logits, expected)
    assert not any("StandIn" in type(m).__name__ for m in network.modules())


@pytest.mark.parametrize("chain", [(1, 2), (0, 1, 1, 1, 3), (3, 0, 2), (0, 1, 2, 1, 2, 1, 2, 3, 3), (2,)])
def test_a_chain_is_a_model_of_those_layers(model, chain):
    name, network = model
    with torch.no_grad():
        expected = built_as(name, chain, network)(IDS, use_cache=False).logits
        other = network(IDS, use_cache=False).logits
    found = Layers(loaded(network)).run(chain, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - other).abs().max() > 1e-3


def test_a_repeated_layer_is_applied_twice(model):
    _, network = model
    layers = Layers(loaded(network))
    start = layers.start(IDS)
    once = layers.apply(1, layers.apply(0, start.hidden, start), start)
    twice = layers.apply(1, once, start)
    assert torch.equal(layers.logits(twice, IDS), layers.run((0, 1, 1), IDS)) and not torch.equal(once, twice)


def test_tokens_are_those_of_a_model_of_those_layers(model):
    """With a cache a place for Riverrun's models, without for others."""
    name, network = model
    prompt, tokens = IDS[0].tolist(), []
    for chain in [(0, 1, 1, 3), tuple(range(4)), (0, 1, 2, 3, 0, 1, 2, 3)]:
        layers = Layers(loaded(network))
        found = [token for _, token in zip(range(8), layers.next_tokens(chain, prompt))]
        oracle, ids = built_as(name, chain, network), IDS[:1]
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, oracle(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert found == ids[0, IDS.shape[1] :].tolist()
        tokens.append(found)
    assert len(set(map(tuple, tokens))) > 1


def test_riverruns_cache_has_a_slot_for_each_place():
    """In float64, where reading everything again agrees with the cache to its rounding."""
    network = exact_hybrid()
    layers, chain, prompt = Layers(loaded(network)), (0, 1, 1, 2, 3, 3, 4, 4), IDS[0].tolist()
    seen = []
    network.register_forward_hook(lambda module, args, out: seen.append(out))
    found = [token for _, token in zip(range(6), layers.next_tokens(chain, prompt))]
    cached = torch.cat([out.logits for out in seen], 1)
    ids = torch.tensor([prompt + found[:-1]])
    torch.testing.assert_close(cached, layers.run(chain, ids, 6), rtol=1e-7, atol=1e-7)
    cache = getattr(seen[0], "cache", None) or seen[0].past_key_values
    assert len(cache.layers) == len(chain) and all(cache.layers)


def test_rows_do_not_depend_on_one_another(model):
    _, network = model
    layers = Layers(loaded(network))
    together, alone = layers.run((0, 1, 1), IDS), layers.run((0, 1, 1), IDS[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)


# what is refused


class Coupled(Planted):
    """A layer is given what the one before has made, besides hidden states."""

    def forward(self, ids, use_cache=False):
        hidden, before = torch.zeros(*ids.shape, 1), None
        for layer in self.layers:
            hidden, before = layer(hidden, before)
        return SimpleNamespace(logits=hidden.expand(-1, -1, 258))


class Pair(nn.Module):
    def forward(self, hidden, before):
        return hidden + 1, hidden * 2


class Shared(Coupled):
    """They share a dictionary in which they leave things for one another."""

    def forward(self, ids, use_cache=False):
        hidden, things = torch.zeros(*ids.shape, 1), {}
        for layer in self.layers:
            hidden = layer(hidden, things)
        return SimpleNamespace(logits=hidden.expand(-1, -1, 258))


class Leaving(nn.Module):
    def forward(self, hidden, things):
        things[len(things)] = hidden
        return hidden + 1


class Twice(Planted):
    def forward(self, ids, use_cache=False):
        hidden = torch.zeros(*ids.shape, 1)
        for layer in [*self.layers, *self.layers]:
            hidden = layer(hidden)
        return SimpleNamespace(logits=hidden.expand(-1, -1, 258))


def with_layers(kind, layer=None):
    network = kind(3, bool)
    if layer is not None:
        network.layers = nn.ModuleList(layer() for _ in range(3))
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: llama(range(1)), "has a single layer: chains need at least 2"),
        (lambda: with_layers(Coupled, Pair), "hand one another more than hidden states"),
        (lambda: with_layers(Shared, Leaving), "hand one another more than hidden states"),
        (lambda: with_layers(Twice), "do not run from first to last, each once"),
    ],
)
def test_models_without_chains_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        Layers(loaded(network()))


def test_a_model_whose_layers_are_no_list_is_refused():
    network = Planted(3, bool)
    network.layers = nn.Sequential(*network.layers)
    with pytest.raises(ValueError, match="has no ModuleList of its 3 layers"):
        Layers(loaded(network))
