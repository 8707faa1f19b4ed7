"""The model with each mixer alone, and with all of them: decoding, packing, losses, gradients, counts."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.memory_options import (
    AtlasOptions,
    DeepTransformerOptions,
    MemoraOptions,
    MonetaOptions,
    OmegaNetOptions,
    TitansLMMOptions,
    TitansMACOptions,
    TitansMAGOptions,
    TitansMALOptions,
    YaadOptions,
)
from riverrun.modeling.mixer_options import (
    AttentionOptions,
    ElmanOptions,
    GatedDeltaOptions,
    GRUOptions,
    LSTMOptions,
    Mamba2Options,
    ParaGRUOptions,
    ParaLSTMOptions,
    PrefixLinearAttentionOptions,
    SLSTMOptions,
)
from riverrun.modeling.mixers import MIXERS
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.split import Split

BASE = ModelOptions(
    vocab_size=37,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=24,
    initializer_range=0.3,  # large, so that every part matters for the logits
    attention=AttentionOptions(num_heads=4, num_kv_heads=2, head_dim=4),
    mamba2=Mamba2Options(head_dim=8, state_size=6, num_groups=2, chunk_size=8),
    gated_delta=GatedDeltaOptions(num_heads=2, head_dim=4, num_householder=2, chunk_size=8),
    para_gru=ParaGRUOptions(num_heads=2, tolerance=1e-12),
    para_lstm=ParaLSTMOptions(num_heads=2, tolerance=1e-12),
    slstm=SLSTMOptions(head_dim=8, recurrent_init=1.0),
    lstm=LSTMOptions(head_dim=8),
    gru=GRUOptions(head_dim=8),
    elman=ElmanOptions(head_dim=8),
    prefix_linear_attention=PrefixLinearAttentionOptions(
        num_heads=2, head_dim=8, feature_dim=4, encoder=False, chunk_size=8
    ),
)
MEMORY = {"num_heads": 2, "head_dim": 4, "expand": 2, "chunk_size": 4, "gate_rank": 3}
BASE = replace(
    BASE,
    titans_lmm=TitansLMMOptions(**MEMORY),
    titans_mag=TitansMAGOptions(**MEMORY, attention_window=5),
    titans_mal=TitansMALOptions(**MEMORY, attention_window=5),
    titans_mac=TitansMACOptions(**MEMORY, segment=8),
    moneta=MonetaOptions(**MEMORY),
    yaad=YaadOptions(**MEMORY),
    memora=MemoraOptions(**MEMORY),
    omeganet=OmegaNetOptions(**MEMORY, omega_window=3),
    atlas=AtlasOptions(**MEMORY, omega_window=3, num_persistent=3),
    deep_transformer=DeepTransformerOptions(**MEMORY),
)
WINDOWED = replace(BASE.attention, window=5)
HYBRID = (
    "mamba2", "gated_delta", "para_gru", "para_lstm", "slstm", "lstm", "gru", "elman", "prefix_linear_attention",
    "attention", "titans_lmm", "titans_mag", "titans_mal", "titans_mac", "moneta", "yaad", "memora", "omeganet",
    "atlas", "deep_transformer",
)  # fmt: skip
SHAPES = {
    "mamba2": replace(BASE, layer_pattern=("mamba2",)),
    "mamba2 alone": replace(BASE, layer_pattern=("mamba2",), intermediate_size=0, tie_word_embeddings=True),
    "gated_delta": replace(BASE, layer_pattern=("gated_delta",)),
    "gated_delta ungated": replace(
        BASE, layer_pattern=("gated_delta",), gated_delta=replace(BASE.gated_delta, use_gate=False, output_gate=False)
    ),
    "para_gru": replace(BASE, layer_pattern=("para_gru",)),
    "para_lstm": replace(BASE, layer_pattern=("para_lstm",)),
    "slstm": replace(BASE, layer_pattern=("slstm",)),
    "slstm without conv": replace(BASE, layer_pattern=("slstm",), slstm=replace(BASE.slstm, conv_kernel=0, expand=2.0)),
    "lstm": replace(BASE, layer_pattern=("lstm",)),
    "gru": replace(BASE, layer_pattern=("gru",)),
    "elman without conv": replace(BASE, layer_pattern=("elman",), elman=replace(BASE.elman, conv_kernel=0)),
    "prefix_linear_attention": replace(BASE, layer_pattern=("prefix_linear_attention",)),
    "titans_lmm": replace(BASE, layer_pattern=("titans_lmm",)),
    "titans_lmm linear": replace(
        BASE, layer_pattern=("titans_lmm",), titans_lmm=replace(BASE.titans_lmm, depth=1, chunk_size=1)
    ),
    "titans_lmm gated, gates of layers": replace(
        BASE, layer_pattern=("titans_lmm",), titans_lmm=replace(BASE.titans_lmm, gated=True, gates="layer")
    ),
    "titans_mag": replace(BASE, layer_pattern=("titans_mag",)),
    "titans_mag, two tokens, gated": replace(
        BASE,
        layer_pattern=("titans_mag",),
        titans_mag=replace(BASE.titans_mag, attention_window=2, num_persistent=0, output_gate=True, rope=False),
    ),
    "titans_mal": replace(BASE, layer_pattern=("titans_mal",)),
    "titans_mal linear": replace(
        BASE,
        layer_pattern=("titans_mal",),
        titans_mal=replace(BASE.titans_mal, depth=1, chunk_size=1, num_persistent=0),
    ),
    "titans_mac": replace(BASE, layer_pattern=("titans_mac",)),
    "titans_mac, segments of a chunk": replace(
        BASE, layer_pattern=("titans_mac",), titans_mac=replace(BASE.titans_mac, segment=4, num_persistent=0)
    ),
    "titans_mac, one segment": replace(
        BASE, layer_pattern=("titans_mac",), titans_mac=replace(BASE.titans_mac, segment=64)
    ),
    "moneta": replace(BASE, layer_pattern=("moneta",)),
    "yaad": replace(BASE, layer_pattern=("yaad",)),
    "memora": replace(BASE, layer_pattern=("memora",)),
    "omeganet": replace(BASE, layer_pattern=("omeganet",)),
    "atlas": replace(BASE, layer_pattern=("atlas",)),
    "deep_transformer": replace(BASE, layer_pattern=("deep_transformer",)),
    "attention": replace(BASE, layer_pattern=("attention",)),
    "attention window": replace(BASE, layer_pattern=("attention",), attention=WINDOWED),
    "attention window 1": replace(BASE, layer_pattern=("attention",), attention=replace(WINDOWED, window=1)),
    "attention nope norms": replace(
        BASE, layer_pattern=("attention",), attention=replace(WINDOWED, rope=False, qk_norm="head")
    ),
    "attention post norm": replace(
        BASE, layer_pattern=("attention",), post_norm_attention=True, attention=replace(BASE.attention, qk_norm="full")
    ),
    "hybrid": replace(BASE, layer_pattern=HYBRID, num_hidden_layers=len(HYBRID)),
    "hybrid window": replace(BASE, layer_pattern=HYBRID, num_hidden_layers=len(HYBRID), attention=WINDOWED),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
V = BASE.vocab_size


def build(shape: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> RiverrunForCausalLM:
    torch.manual_seed(seed)
    model = RiverrunForCausalLM(RiverrunConfig.from_options(SHAPES[shape]))
    return model.to(dtype).eval()


def tokens(*size: int) -> torch.Tensor:
    return torch.randint(0, V, size, generator=torch.Generator().manual_seed(1))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rtol: float | None = None) -> None:
    """Up to `rtol` of the largest expected value; by default the rounding of the type."""
    rtol = rtol or {torch.float32: 1e-4, torch.float64: 1e-10}[expected.dtype]
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


# decoding


@torch.no_grad()
def in_calls(model: RiverrunForCausalLM, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of a sequence that is fed to one cache in pieces."""
    cache, logits = RiverrunCache(model.config.num_hidden_layers), []
    assert sum(sizes) == ids.shape[1]
    for piece in ids.split(sizes, dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    assert cache.seen == ids.shape[1]
    return torch.cat(logits, dim=1)


SPLITS = {"1+rest": [1, 25], "k+1+1+…": [17] + [1] * 9, "all steps": [1] * 26, "chunks": [3, 9, 2, 8, 4]}


@every_shape
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefill_and_steps_equal_the_full_forward(shape, split, dtype):
    model, ids = build(shape, dtype=dtype), tokens(2, 26)
    assert_close(in_calls(model, ids, SPLITS[split]), model(ids).logits.detach())


@every_shape
def test_the_cache_is_returned_only_where_asked_for(shape):
    model, ids = build(shape), tokens(1, 6)
    assert model(ids).past_key_values is None
    out = model(ids, use_cache=True)
    assert_close(model(ids[:, :1], past_key_values=out.past_key_values).logits.detach(),
                 model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:].detach())  # fmt: skip


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_documents_equal_separate_rows(shape, dtype):
    model, ids = build(shape, dtype=dtype), tokens(2, 20)
    bounds = [0, 1, 8, 20, 33, 40]  # a document of one token; a row start is a bound
    packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).logits.flatten(0, 1)
    flat = ids.flatten()
    for start, stop in itertools.pairwise(bounds):
        assert_close(packed[start:stop], model(flat[None, start:stop]).logits[0])


@every_shape
def test_decoding_goes_on_from_a_packed_prefill(shape):
    """Each row's last document is the one that goes on."""
    model, ids = build(shape, dtype=torch.float64), tokens(2, 16)
    cu_seqlens = torch.tensor([0, 5, 16, 18, 32], dtype=torch.int32)
    cache = model(ids, cu_seqlens=cu_seqlens, use_cache=True).past_key_values
    new = tokens(2, 3)
    got = [model(new[:, t : t + 1], past_key_values=cache).logits[:, 0] for t in range(3)]
    for row, start in enumerate([5, 2]):
        whole = torch.cat([ids[row, start:], new[row]])
        assert_close(torch.stack([g[row] for g in got]), model(whole[None]).logits[0, -3:])


@every_shape
def test_left_padded_rows_equal_unpadded_ones(shape):
    model, lengths = build(shape, dtype=torch.float64), [12, 7, 1]
    ids = tokens(3, 12)
    mask = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    out = model(ids, attention_mask=mask, use_cache=True)
    cache, new = out.past_key_values, tokens(3, 4)
    stepped = []
    for t in range(4):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        stepped.append(model(new[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    logits = torch.cat([out.logits, *stepped], dim=1)
    for row, n in enumerate(lengths):
        alone = model(torch.cat([ids[row, 12 - n :], new[row]])[None]).logits[0]
        assert_close(logits[row, 12 - n :], alone)


def test_padding_that_cannot_be_skipped_is_refused():
    model, ids = build("hybrid"), tokens(2, 4)
    for bad in ([1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="padding_side = 'left'"):
            model(ids, attention_mask=torch.tensor([bad, [1, 1, 1, 1]]))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="pad the prompts on the left"):
        model(ids, attention_mask=torch.tensor([[1] * 4 + [0, 1, 1, 1]] * 2), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot continue a cache"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32), past_key_values=cache)


@every_shape
def test_beams_can_be_picked(shape):
    model, ids = build(shape, dtype=torch.float64), tokens(3, 9)
    cache = model(ids, use_cache=True).past_key_values.reorder_cache(torch.tensor([2, 2, 0, 1]))
    new = tokens(4, 1)
    expected = model(torch.cat([ids[[2, 2, 0, 1]], new], dim=1)).logits[:, -1:]
    assert_close(model(new, past_key_values=cache).logits, expected)


@every_shape
def test_generate_takes_the_likeliest_token_of_full_forwards(shape):
    model, prompt = build(shape), tokens(2, 5)
    mask = torch.ones_like(prompt)  # token 0 of the prompt is no padding
    got = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, expected)


@every_shape
def test_later_tokens_change_nothing_before_them(shape):
    model, ids = build(shape), tokens(1, 20)
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % V
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11], after[:, 11])


def test_a_window_forgets():
    model = build("attention window 1")
    ids = tokens(1, 6)
    assert_close(model(ids).logits[0, -1], model(ids[:, -1:]).logits[0, -1])


# losses and gradients


@every_shape
def test_loss_on_targets_is_the_cross_entropy_of_the_logits(shape):
    model, ids = build(shape, dtype=torch.float64), tokens(2, 12)
    targets = tokens(2, 12).flip(1)
    targets[0, :3] = -100
    cu_seqlens = torch.tensor([0, 4, 12, 24], dtype=torch.int32)
    logits = model(ids, cu_seqlens=cu_seqlens).logits
    out = model(ids, cu_seqlens=cu_seqlens, targets=targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert out.logits is None
    assert_close(out.loss, expected)
    assert_close(out.cross_entropy, expected * 21) and not out.cross_entropy.requires_grad
    assert_close(model(ids, cu_seqlens=cu_seqlens, targets=targets, num_targets=7).loss, expected * 3)
    with_z = expected + 0.1 * logits.logsumexp(-1).square()[targets != -100].mean()
    assert_close(model(ids, cu_seqlens=cu_seqlens, targets=targets, z_loss=0.1).loss, with_z)


def test_labels_are_shifted_as_in_transformers():
    from transformers.loss.loss_utils import ForCausalLMLoss

    model, ids = build("hybrid"), tokens(2, 12)
    labels = ids.clone()
    labels[1, :4] = -100
    out = model(ids, labels=labels)
    assert_close(out.loss, ForCausalLMLoss(out.logits, labels, V))
    with pytest.raises(ValueError, match="not both"):
        model(ids, labels=labels, targets=labels)


def test_logits_of_the_last_positions_only():
    model, ids = build("hybrid"), tokens(2, 12)
    assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def gradients(model: RiverrunForCausalLM) -> dict[str, torch.Tensor]:
    model.train()
    ids = tokens(2, 13)
    cu_seqlens = torch.tensor([0, 5, 13, 26], dtype=torch.int32)
    model.zero_grad()
    model(ids, targets=ids.flip(1), cu_seqlens=cu_seqlens).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@every_shape
def test_recompute_changes_no_gradient(shape):
    model = build(shape)
    stored = {name: grad.clone() for name, grad in gradients(model).items()}
    model.set_recompute(True)
    forwards = []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: forwards.append(1))
    recomputed = gradients(model)
    assert len(forwards) == 2  # once more in the backward pass
    for name, grad in stored.items():
        assert torch.equal(grad, recomputed[name]), name


@every_shape
def test_every_parameter_learns(shape):
    """Except those whose gradient is zero by their meaning."""
    for name, grad in gradients(build(shape)).items():
        if shape == "attention window 1" and name.endswith(("q_proj.weight", "k_proj.weight")):
            assert grad.abs().max() < 1e-6  # a softmax over one key
        else:
            assert grad is not None and grad.abs().max() > 0, name


@every_shape
def test_bf16_is_finite_and_near_fp32(shape):
    model, ids = build(shape), tokens(16, 20)  # a memory's rounding differs from row to row, by a factor of ten
    expected = model(ids).logits
    low = build(shape)
    low.bfloat16()
    for name, p in low.named_parameters():
        if name.rpartition(".")[2] in low._keep_in_fp32_modules_strict:
            p.data = model.get_parameter(name).data
    got = low(ids).logits
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    if shape == "atlas":
        return  # orthogonal updates make as much of small singular values, which rounding changes, as of large ones
    assert (got.float() - expected).norm() < 0.1 * expected.norm()


# counts


@every_shape
def test_the_plan_of_tensor_parallelism_covers_every_parameter(shape):
    for block in build(shape).model.layers:
        plan = block.mixer.parameter_plan(2)
        parameters = dict(block.mixer.named_parameters())
        assert set(plan) == set(parameters)
        for name, split in plan.items():
            dim = split.dim if isinstance(split, Split) else split
            assert dim is None or parameters[name].shape[dim] % 2 == 0, name


@every_shape
@pytest.mark.parametrize("seq_len", [1, 4, 5, 26])
def test_state_bytes_are_those_of_the_cache(shape, seq_len):
    """Stated for bf16 models; an fp32 cache holds the same recurrent states and twice the rest."""
    model = build(shape)
    cache = model(tokens(1, seq_len), use_cache=True).past_key_values
    stated = 0
    for layer in cache.layers:
        for name, state in layer.items():
            recurrent = name in ("ssd", "delta", "cell", "linear") or name.startswith("memory_")
            assert state.dtype == torch.float32
            stated += state.numel() * (4 if recurrent else 2)
    assert model.state_bytes(seq_len) == stated
    assert stated <= cache.num_bytes() == sum(s.numel() * 4 for layer in cache.layers for s in layer.values())


@every_shape
def test_a_bf16_cache_keeps_recurrent_states_in_fp32(shape):
    model = build(shape).bfloat16()
    cache = model(tokens(3, 7), use_cache=True).past_key_values
    assert cache.num_bytes() == 3 * model.state_bytes(7)


@every_shape
def test_flops_grow_with_attention_only(shape):
    model = build(shape)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and "embed" not in name)
    matrices += model.lm_head.weight.numel() if model.config.tie_word_embeddings else 0
    short, long, longer = (model.flops_per_token(n) for n in (1024, 2048, 4096))
    assert short > 2 * matrices
    if "attention" in SHAPES[shape].layer_pattern and SHAPES[shape].attention.window is None:
        # windows, which some mixers have of their own, are shorter at the start of a row
        assert longer - long == pytest.approx(2 * (long - short), rel=1e-5) and long > short
    else:
        assert longer == pytest.approx(short, rel=1e-2)


def test_flops_of_attention_are_those_of_the_visible_keys():
    model = build("attention window")
    o = model.config.options.attention
    for seq_len in (3, 5, 11):
        seen = sum(min(t + 1, 5) for t in range(seq_len)) / seq_len
        flops = model.model.layers[0].mixer.mixing_flops(seq_len)
        assert flops == pytest.approx(2 * 2 * o.num_heads * o.head_dim * seen)  # scores and values, 2 a multiply-add


def test_every_mixer_is_covered_here():
    assert set(HYBRID) == set(MIXERS)
