"""Models of recurrent depth: how they start, what they count, which options they take."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import AttentionOptions
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.sharding import meta_model
from tests.modeling.depth.shapes import DEPTH, HUGINN, build, tokens

KEYS = torch.tensor([11, 12])


def huginn() -> ModelOptions:
    return ModelOptions(
        vocab_size=65_536, hidden_size=5280, num_hidden_layers=8, layer_pattern=("attention",), norm_eps=1e-6,
        intermediate_size=17_920, tie_word_embeddings=True, initializer="takase", scale_embedding=True,
        sandwich_norm=True, depth=DepthOptions(),
        attention=AttentionOptions(num_heads=55, head_dim=96, rope_theta=50_000, qk_bias=True),
    )  # fmt: skip


def test_the_number_of_parameters_is_huginns():
    assert sum(p.numel() for p in meta_model(RiverrunConfig.from_options(huginn())).parameters()) == 3_564_976_800


def test_takases_initial_weights():
    options = replace(huginn(), vocab_size=600, hidden_size=192, intermediate_size=512, num_hidden_layers=8)
    options = replace(options, attention=replace(options.attention, num_heads=2))
    model = RiverrunForCausalLM(RiverrunConfig.from_options(options))
    assert model.config.options.effective_layers == 132
    cut = 0.98658  # of a normal distribution's deviation, cut off at three
    for name, p in model.named_parameters():
        if p.dim() == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = math.sqrt(1 / (5 * 192 * 132) if writes else 2 / (5 * 192))
            assert p.abs().max() <= 3 * std, name
            assert p.std().item() == pytest.approx(cut * std, rel=0.03), name
        else:
            assert torch.equal(p, torch.zeros_like(p) if "bias" in name else torch.ones_like(p)), name
    embedded = model.model.embed(torch.arange(600)[None])
    assert embedded.std().item() == pytest.approx(cut * math.sqrt(2 / 5), rel=0.01)
    s = model.model.initial_state(embedded, Layout.of_rows((1, 600), torch.zeros(1, dtype=torch.long)))
    assert s.std().item() == pytest.approx(cut * math.sqrt(2 / 5), rel=0.01)


def test_residual_writers_of_normal_weights_count_iterations():
    model = RiverrunForCausalLM(RiverrunConfig.from_options(replace(HUGINN, hidden_size=64, initializer_range=0.02)))
    layers = 1 + 5 * 2 + 1
    std = torch.cat([block.mixer.o_proj.weight.flatten() for block in model.model.layers]).std().item()
    assert std == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.05)


@pytest.mark.parametrize("shape", ["attention", "attention, diagonal", "all core"])
def test_matrix_flops_are_those_that_are_done(shape):
    model, T = build(shape), 6
    ids, core = tokens(1, T), model.model.core
    mixing = {name: block.mixer.mixing_flops(T) for name, block in (("core", core.layers[0]),)}["core"]
    for r in (1, 5):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, num_steps=r)
        done = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
        head = 2 * model.lm_head.weight.numel()
        layers = len(model.model.prelude) + len(model.model.coda) + r * len(core.layers)
        assert done == T * (head + model.model.flops_per_token(T, iterations=r) - layers * mixing)
    assert model.flops_per_token(T) == head + model.model.flops_per_token(T, iterations=5)


def test_states_are_counted_for_every_iteration():
    model = build("attention", torch.float32)
    cache = model(tokens(1, 10), use_cache=True).past_key_values
    assert cache.num_bytes() == 2 * model.state_bytes(10)  # counted in bf16
    assert len(cache.layers) == 2 + 5 * 2


def test_what_goes_wrong_is_said():
    def problems(**changes):
        options = replace(HUGINN, **{k: v for k, v in changes.items() if k in ("sandwich_norm", "post_norm_attention")})
        depth = replace(DEPTH, **{k: v for k, v in changes.items() if hasattr(DEPTH, k)})
        return "\n".join(replace(options, depth=depth).resolve().problems())

    assert problems() == ""
    for changes, message in (
        ({"prelude_layers": -1}, "must not be negative"),
        ({"coda_layers": 3}, "set num_hidden_layers to at least 5"),
        ({"mean_recurrence": 0}, "depth.mean_recurrence=0 must be at least 1"),
        ({"backprop_depth": 0}, "depth.backprop_depth=0 must be at least 1"),
        ({"sampling": "sobol"}, "depth.sampling='sobol' is unknown; choose from poisson-lognormal-filling, fixed"),
        ({"injection": "add"}, "depth.injection='add' is unknown; choose from linear, diagonal"),
        ({"sigma": -0.5}, "depth.sigma=-0.5"),
        ({"sigma": math.nan}, "depth.sigma=nan"),
        ({"state_std": -1.0}, "depth.state_std=-1.0"),
        ({"post_norm_attention": True}, "set one of them"),
    ):
        assert message in problems(**changes), changes
    with pytest.raises(ValueError, match="leave no core"):
        RiverrunConfig.from_options(replace(HUGINN, num_hidden_layers=2))
    with pytest.raises(ValueError, match="initializer='zero' is unknown"):
        RiverrunConfig.from_options(replace(HUGINN, initializer="zero"))
    ids, plain = tokens(2, 4), build(replace(HUGINN, depth=None))
    for given in ({"num_steps": 3}, {"row_keys": KEYS}):
        with pytest.raises(ValueError, match="models of recurrent depth"):
            plain(ids, **given)
    with pytest.raises(ValueError, match="cannot pass states from row to row"):
        build("gated_delta").train()(ids, targets=ids, states=[{}] * 4)


def test_options_survive_and_stay_out_of_other_models():
    options = replace(HUGINN, depth=replace(DEPTH, state_std=0.0, injection="diagonal")).resolve()
    assert ModelOptions.from_dict(options.to_dict()).resolve().depth == options.depth
    assert ModelOptions.from_dict(options.to_dict()).resolve().to_dict() == options.to_dict()
    assert "depth" not in replace(HUGINN, depth=None).to_dict()
    assert replace(HUGINN, depth=None).effective_layers == 4 and HUGINN.effective_layers == 12


def test_embeddings_of_zero_std_states_are_deterministic():
    model, ids = build(replace(HUGINN, depth=replace(DEPTH, state_std=0.0))), tokens(2, 6)
    assert torch.equal(model(ids, row_keys=KEYS).logits, model(ids).logits)
    assert not model.model.initial_state(torch.ones(2, 6, 16), Layout.of_rows((2, 6), torch.zeros(2).long())).any()


def test_biases_of_queries_and_keys_come_before_the_rotation():
    """Biases of q and k alone, of a layer whose projections are zero: scores follow from differences of places."""
    options = replace(HUGINN, depth=None, num_hidden_layers=1, attention=replace(HUGINN.attention, num_kv_heads=4))
    mixer = build(options).model.layers[0].mixer
    for projection in (mixer.q_proj, mixer.k_proj):
        projection.weight.data.zero_()
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    layout = Layout.of_rows((1, 7), torch.zeros(1, dtype=torch.long))
    model = build(options).model
    model.prepare_attention(layout, None, x.dtype)
    q, k = mixer.q_bias.view(4, 4), mixer.k_bias.view(4, 4)
    scores = torch.full((4, 7, 7), -torch.inf, dtype=torch.float64)
    for i in range(7):
        for j in range(i + 1):
            angle = (i - j) * mixer.options.rope_theta ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
            qc, kc = torch.complex(q[:, :2], q[:, 2:]), torch.complex(k[:, :2], k[:, 2:])
            scores[:, i, j] = (qc * kc.conj() * torch.polar(torch.ones(2).double(), angle)).sum(-1).real / 2
    v = mixer.v_proj(x).view(7, 4, 4).transpose(0, 1)
    expected = mixer.o_proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(mixer(x, layout)[0], expected, rtol=1e-6, atol=1e-6)
