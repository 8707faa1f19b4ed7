import torch
from torch import nn

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.mixer_options import AttentionOptions, GatedDeltaOptions, Mamba2Options
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.train import optim
from riverrun.train.config import OptimizerConfig

MIXERS = ("mamba2", "gated_delta", "attention")


def hybrid(**options):
    shape = ModelOptions(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        layer_pattern=MIXERS,
        mamba2=Mamba2Options(head_dim=16),
        gated_delta=GatedDeltaOptions(head_dim=16),
        attention=AttentionOptions(head_dim=16),
        **options,
    )
    return RiverrunForCausalLM(RiverrunConfig.from_options(shape.resolve()))


def names(model, params):
    known = {p: name for name, p in model.named_parameters()}
    return {known[p] for p in params}


def test_every_parameter_is_in_one_group_with_the_decay_and_type_it_asks_for():
    model = hybrid()
    groups = optim.parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    seen = [p for group in groups for p in group["params"]]
    assert len(seen) == len({id(p) for p in seen}) == len(list(model.parameters()))
    for group in groups:
        assert group["peak_lr"] == group["lr"] == 3e-4 and not group["use_muon"]
        assert len({getattr(p, "keep_fp32", False) for p in group["params"]}) == 1
        for name in names(model, group["params"]):
            leaf = name.rpartition(".")[2]
            plain = "norm" in name or leaf in ("bias", "A_log", "D", "dt_bias")
            assert (group["weight_decay"] == 0) == plain, name


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    model = hybrid()
    groups = optim.parameter_groups(model, OptimizerConfig(name="muon", muon_lr=0.02, lr=1e-3))
    for group in groups:
        for name in names(model, group["params"]):
            assert group["use_muon"] == (name.endswith("_proj.weight")), name
        assert group["peak_lr"] == (0.02 if group["use_muon"] else 1e-3)
    adamw = set().union(*(names(model, g["params"]) for g in groups if not g["use_muon"]))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= adamw
    assert any("conv" in name for name in adamw), "depthwise convolutions are not matrices"


def test_a_head_tied_to_the_embedding_is_not_a_hidden_matrix():
    model = hybrid(tie_word_embeddings=True)
    assert "model.embed_tokens.weight" not in names(model, optim.muon_matrices(model))


def test_the_schedule_scales_every_group_by_its_own_peak():
    groups = [{"lr": 0.0, "peak_lr": 0.02}, {"lr": 0.0, "peak_lr": 1e-3}]
    optim.set_lr(groups, 0.5)
    assert [group["lr"] for group in groups] == [0.01, 5e-4]


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = optim.parameter_groups(model, OptimizerConfig())
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model[1].parameters()}
    assert isinstance(optim.adamw(groups, torch.device("cpu")), torch.optim.AdamW)
