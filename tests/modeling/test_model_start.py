"""What the weights of models start from, what options are impossible, and models that are saved and loaded."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import ElmanOptions, GRUOptions, LSTMOptions, SLSTMOptions
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from tests.modeling.test_model import BASE, HYBRID, SHAPES, build, every_shape, tokens


def test_decays_start_as_in_the_papers():
    torch.manual_seed(0)
    wide = replace(BASE, hidden_size=512, layer_pattern=("mamba2", "gated_delta"))
    wide = replace(wide, gated_delta=replace(BASE.gated_delta, num_heads=128))
    model = RiverrunForCausalLM(RiverrunConfig.from_options(wide))
    for block in model.model.layers:
        A, dt = block.mixer.A_log.exp(), F.softplus(block.mixer.dt_bias)
        assert A.min() >= 1 and A.max() <= 16 + 1e-4 and A.max() - A.min() > 10
        assert dt.min() >= 1e-3 * (1 - 1e-4) and dt.max() <= 1e-1 * (1 + 1e-4)
        middle = dt.log().median().item()
        assert abs(middle - math.log(1e-2)) < 0.8  # log-uniform: half of them below the geometric mean
        assert block.mixer.A_log.dtype == block.mixer.dt_bias.dtype == torch.float32
    assert torch.equal(model.model.layers[0].mixer.D, torch.ones(128))


def test_weights_start_by_the_seed_and_the_depth():
    one, same, other = build("hybrid", 0), build("hybrid", 0), build("hybrid", 1)
    for (name, p), q, r in zip(one.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(p, q), name
        fixed = p.unique().numel() == 1 or name.endswith(("gate_bias", "feature_scale"))  # evenly spaced, 1 / i!
        assert fixed or not torch.equal(p, r), name
    torch.manual_seed(0)
    big = RiverrunForCausalLM(
        RiverrunConfig.from_options(
            ModelOptions(vocab_size=512, hidden_size=128, num_hidden_layers=8, layer_pattern=("attention",))
        )
    )
    block = big.model.layers[0]
    for weight in (
        big.model.embed_tokens.weight,
        big.lm_head.weight,
        block.mixer.q_proj.weight,
        block.mlp.up_proj.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (block.mixer.o_proj.weight, block.mlp.down_proj.weight):  # two of them a layer
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)


def test_para_weights_never_pass_their_bound():
    mixer = build("para_lstm").model.layers[0].mixer
    with torch.no_grad():
        mixer.recurrent_weight.fill_(100.0)
    assert mixer.bounded(mixer.recurrent_weight).max() <= 0.5
    small = torch.tensor([1e-3])
    assert mixer.bounded(small).item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("name, longest", [("slstm", 1 / 12), ("lstm", 1), ("gru", 1)])
def test_keeping_gates_start_from_short_to_long_memories(name, longest):
    """At the largest bias twelve tokens fade nothing (sLSTM then averages over them), at the smallest all."""
    torch.manual_seed(0)
    mixer = build(name).model.layers[0].mixer
    with torch.no_grad():
        mixer.recurrent_weight.zero_()
        gates = torch.zeros(1, 12, mixer.num_gates, mixer.inner)
        gates[:, 0, -1 if name == "gru" else 2] = 1.0  # something to remember, and then nothing
        h = mixer.recur(gates, Layout.of_rows((1, 12), torch.zeros(1, dtype=torch.long)), None)
    kept = (h[0, -1] / h[0, 0]).abs()
    assert (kept.diff() > 0).all() and kept[:, 0].max() < 0.01
    assert kept[:, -1].tolist() == pytest.approx([longest] * len(kept), rel=0.05)


@pytest.mark.parametrize(
    "options, problem",
    [
        (ElmanOptions(head_dim=0), "elman.head_dim=0 must be positive"),
        (GRUOptions(conv_kernel=-1), "gru.conv_kernel=-1 must not be negative; 0 is none"),
        (GRUOptions(head_dim=48), "gru.head_dim=48 must divide expand × hidden_size = 64; try 32"),
        (LSTMOptions(forget_bias_min=7.0), "lstm.forget_bias_min=7.0 must not be above lstm.forget_bias_max=6.0"),
        (SLSTMOptions(), None),
    ],
)
def test_impossible_heads_are_refused(options, problem):
    assert options.problems(64) == ([] if problem is None else [problem])


@pytest.mark.parametrize("name", ["slstm", "lstm", "gru", "elman"])
def test_heads_of_an_rnn_do_not_see_each_other(name):
    mixer = build("hybrid").model.layers[HYBRID.index(name)].mixer
    layout = Layout.of_rows((1, 9), torch.zeros(1, dtype=torch.long))
    gates = torch.randn(1, 9, mixer.num_gates, mixer.inner, requires_grad=True)
    grad = torch.autograd.grad(mixer.recur(gates, layout, None)[:, -1, 0].sum(), gates)[0].unflatten(-1, (2, 8))
    assert grad[..., 0, :].any() and not grad[..., 1, :].any()


def test_a_tied_head_is_the_embedding():
    model = build("mamba2 alone")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert build("mamba2").lm_head.weight is not build("mamba2").model.embed_tokens.weight


@every_shape
def test_saving_and_loading_changes_no_bit(shape, tmp_path):
    model, ids = build(shape), tokens(2, 9)
    model.save_pretrained(tmp_path)
    back = RiverrunForCausalLM.from_pretrained(tmp_path)
    assert back.config.options == model.config.options
    for (name, p), q in zip(model.named_parameters(), back.named_parameters()):
        assert name == q[0] and torch.equal(p, q[1]), name
        q[1].data = q[1].data.clone()  # products of a file's memory, which is not aligned, can differ in the last bit
    assert torch.equal(model(ids).logits, back.eval()(ids).logits)
    if SHAPES[shape].tie_word_embeddings:
        assert back.lm_head.weight is back.model.embed_tokens.weight


def test_decays_stay_in_fp32_when_loaded_in_bf16(tmp_path):
    build("hybrid").save_pretrained(tmp_path)
    back = RiverrunForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in back.named_parameters():
        decay = name.rpartition(".")[2] in back._keep_in_fp32_modules_strict
        assert p.dtype == (torch.float32 if decay else torch.bfloat16), name
    assert back(tokens(1, 9)).logits.isfinite().all()
