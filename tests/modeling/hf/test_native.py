"""Models in transformers' own classes: the same logits, the same generation, the same weights back.

Bound: ‖ours − theirs‖ ≤ 1e-5 ‖theirs‖ over all float32 logits. Measured: 0.6e-6 to 3e-6; a norm's epsilon of 1e-5
instead of 1e-4 would give 6e-3, any swapped tensor more than 0.5.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, mamba2, olmo, randomised, with_options
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, OlmoHybridConfig, OlmoHybridForCausalLM

from riverrun.modeling.hf import mamba2 as native_mamba2
from riverrun.modeling.hf.export import export_model, resolve_target
from riverrun.modeling.hf.importer import import_model, load_pretrained

CASES = {
    "mamba2": mamba2(),
    "mamba2_groups_tied": mamba2(groups=2, tied=True),
    "mamba2_no_conv_bias": mamba2(conv_bias=False, conv_kernel=3, expand=1),
    "olmo": olmo(),
    "olmo_nope_tied": olmo(rope=False, tied=True),
    "olmo_positive": olmo(neg_eigval=False, head_dim=16),
}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.fixture(params=CASES, ids=str)
def exported(request, tmp_path):
    if request.param == "mamba2_groups_tied" and not native_mamba2._has_grouped_norm():
        pytest.skip("the installed transformers ignores groups in the gated norm")
    ours = randomised(CASES[request.param])
    name = export_model(ours.config, ours.state_dict(), tmp_path / "out")
    assert name == ("Mamba2ForCausalLM" if "mamba2" in request.param else "OlmoHybridForCausalLM")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == name
    return ours, theirs, tmp_path / "out"


@torch.no_grad()
def test_logits_and_generation_are_equal(exported):
    ours, theirs, _ = exported
    ids = torch.randint(0, VOCAB, (2, 85))
    a, b = ours(ids).logits, theirs(ids).logits
    assert b.abs().max() > 0.5 and close(a, b)
    prompt = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    assert torch.equal(ours.generate(ids[:, :9], **prompt), theirs.generate(ids[:, :9], **prompt))


@torch.no_grad()
def test_round_trip_is_bitwise(exported, tmp_path):
    ours, theirs, folder = exported
    config, weights = import_model(folder)
    assert config.model == ours.config.model
    expected = dict(ours.named_parameters())
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    theirs.save_pretrained(tmp_path / "saved")  # in transformers' own way of writing
    config, weights = import_model(tmp_path / "saved")
    assert config.model == ours.config.model
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    ids = torch.randint(0, VOCAB, (1, 20))
    assert torch.equal(load_pretrained(folder)(ids).logits, ours(ids).logits)


THEIRS = {
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCAB, hidden_size=32, num_heads=8, head_dim=8, state_size=8, num_hidden_layers=2,
            n_groups=2 if native_mamba2._has_grouped_norm() else 1,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    ),
    "olmo_hybrid": lambda: OlmoHybridForCausalLM(
        OlmoHybridConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", THEIRS)
@torch.no_grad()
def test_their_models_come_back_bitwise(kind, tmp_path):
    theirs = THEIRS[kind]().eval()
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, VOCAB, (2, 70))
    assert close(ours(ids).logits, theirs(ids).logits)
    export_model(ours.config, ours.state_dict(), tmp_path / "back", target=kind)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(theirs)
    expected, found = theirs.state_dict(), back.state_dict()
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_names_of_transformers_modules_are_read_too(tmp_path):
    """Checkpoints with the names inside transformers' modules, the convolutions in one tensor."""
    ours = randomised(olmo())
    export_model(ours.config, ours.state_dict(), tmp_path / "out")
    theirs = OlmoHybridForCausalLM.from_pretrained(tmp_path / "out")
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert "model.layers.0.linear_attn.conv1d.weight" in state
    save_file(state, tmp_path / "out" / "model.safetensors")
    _, weights = import_model(tmp_path / "out")
    for name, p in ours.named_parameters():
        assert torch.equal(weights[name], p), name


def test_bf16_keeps_the_decays_in_fp32(tmp_path):
    ours = randomised(mamba2())
    export_model(ours.config, ours.state_dict(), tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    fp32 = {name.rpartition(".")[2] for name, t in stored.items() if t.dtype == torch.float32}
    assert fp32 == {"A_log", "D", "dt_bias"}
    assert torch.equal(stored["backbone.layers.0.mixer.A_log"], ours.model.layers[0].mixer.A_log)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert load_pretrained(tmp_path / "out").model.embed_tokens.weight.dtype == torch.bfloat16


REASONS = {
    "mamba2": (
        with_options(olmo(), "gated_delta", num_householder=2),
        ["also has attention, gated_delta", "no feed-forward layers"],
    ),
    "olmo_hybrid": (
        with_options(
            with_options(olmo(), "gated_delta", num_householder=2, use_gate=False, output_gate=False, norm_eps=1e-6),
            "attention",
            window=4,
            qk_norm="none",
        ),
        [
            "num_householder=2", "use_gate=true", "output_gate=true", "norm_eps at 1e-05", "attention.window=4",
            'qk_norm="full"',
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", REASONS)
def test_every_reason_is_listed(target):
    options, reasons = REASONS[target]
    config = randomised(options).config
    with pytest.raises(ValueError, match="use target riverrun") as error:
        resolve_target(config, target)
    for reason in reasons:
        assert reason in str(error.value)
    assert resolve_target(config, "auto") == "riverrun"


def test_other_epsilons_are_a_reason():
    config = randomised(with_options(mamba2(), "mamba2", norm_eps=1e-6)).config
    with pytest.raises(ValueError, match="one epsilon for all norms"):
        resolve_target(config, "mamba2")
    with pytest.raises(ValueError, match=r"at least one attention layer"):
        resolve_target(config, "olmo_hybrid")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mamba2", {"time_step_limit": [0.0, 0.5]}, "step sizes have no limit"),
        ("mamba2", {"use_bias": True}, "no bias"),
        ("olmo_hybrid", {"linear_num_key_heads": 2}, "not grouped"),
        ("olmo_hybrid", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "not scaled"),
    ],
)
def test_what_our_model_cannot_compute_is_not_imported(kind, changes, message, tmp_path):
    import json

    theirs = THEIRS[kind]()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path)


def test_class_without_grouped_norm_is_not_used_for_groups(monkeypatch):
    config = randomised(mamba2(groups=2)).config
    monkeypatch.setattr(native_mamba2, "_has_grouped_norm", lambda: False)
    with pytest.raises(ValueError, match="upgrade transformers"):
        resolve_target(config, "mamba2")
    assert resolve_target(config) == "riverrun"
    assert resolve_target(randomised(mamba2(groups=1)).config) == "mamba2"
