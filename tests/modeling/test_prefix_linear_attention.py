"""Prefix linear attention: its sums by hand, as a recurrence, and in whole models that read a prefix."""

import itertools
from dataclasses import replace

import pytest
import torch

from riverrun.kernels.ssd import ssd
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import AttentionOptions, PrefixLinearAttentionOptions
from riverrun.modeling.mixers import PrefixLinearAttention
from riverrun.modeling.mixers.prefix_linear_attention import features
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions

OPTIONS = PrefixLinearAttentionOptions(num_heads=2, head_dim=8, feature_dim=4, chunk_size=8)
MODEL = ModelOptions(
    vocab_size=37, hidden_size=16, num_hidden_layers=2, intermediate_size=24, initializer_range=0.3,
    layer_pattern=("prefix_linear_attention", "attention"), prefix_linear_attention=OPTIONS,
    attention=AttentionOptions(num_heads=2, head_dim=8, window=6),
)  # fmt: skip
WIDTH, T, M = 16, 26, 10
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4}
both_types = pytest.mark.parametrize("dtype", ROUNDING)


def mixer(dtype=torch.float64) -> PrefixLinearAttention:
    made = PrefixLinearAttention(OPTIONS, WIDTH, 1e-5)
    for layer in made.children():
        torch.nn.init.normal_(layer.weight, std=0.4)
    return made.to(dtype)


def build(dtype=torch.float64, **changes) -> RiverrunForCausalLM:
    torch.manual_seed(0)
    return RiverrunForCausalLM(RiverrunConfig.from_options(replace(MODEL, **changes))).to(dtype).eval()


def rows(count: int, prefix: torch.Tensor | None, length: int = T) -> Layout:
    layout = Layout.of_rows((count, length), torch.zeros(count, dtype=torch.int64))
    layout.prefix = prefix
    return layout


def first(ends: list[int], length: int = T) -> torch.Tensor:
    return torch.arange(length) < torch.tensor(ends)[:, None]


def heads(layer, x):
    return layer(x).unflatten(-1, (OPTIONS.num_heads, -1)).transpose(1, 2)  # (B, H, T, …)


def quadratic(layer: PrefixLinearAttention, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """By scores of all pairs, 1 + s + s²/2, and masks."""
    q, k, v, ek, ev = (heads(getattr(layer, f"{n}_proj"), x) for n in ("q", "k", "v", "encoder_k", "encoder_v"))

    def scores(k: torch.Tensor) -> torch.Tensor:
        s = q @ k.mT / OPTIONS.feature_dim**0.5
        return 1 + s + s * s / 2

    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    own, of_prefix = scores(k) * causal, scores(ek) * prefix[:, None, None, :]
    y = (own @ v + of_prefix @ ev) / (own.sum(-1, keepdim=True) + of_prefix.sum(-1, keepdim=True))
    return layer.o_proj(y.transpose(1, 2).flatten(2))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= ROUNDING[expected.dtype] * expected.abs().max()


@pytest.mark.parametrize("d", [1, 4, 16])
def test_features_are_exp_to_the_second_order(d):
    q, k = torch.randn(2, 7, d, dtype=torch.float64)
    s = (q * k).sum(-1) / d**0.5
    made = features(q)
    assert made.shape == (7, 1 + d + d * (d + 1) // 2) and made.shape[1] == replace(OPTIONS, feature_dim=d).num_features
    torch.testing.assert_close((made * features(k)).sum(-1), 1 + s + s**2 / 2, rtol=1e-12, atol=1e-13)


@both_types
@pytest.mark.parametrize("ends", [[M, M], [3, T], [1, 0]], ids=str)
def test_equals_the_masked_quadratic_form(dtype, ends):
    layer, x = mixer(dtype), torch.randn(2, T, WIDTH, dtype=dtype, requires_grad=True)
    prefix = first(ends)
    got, want = layer(x, rows(2, prefix)), quadratic(layer, x, prefix)
    close(got, want)
    upstream, leaves = torch.randn_like(want), [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want))):
        close(a, b)
        assert b.abs().max() > 0


def test_without_a_prefix_it_is_causal():
    layer, x = mixer(), torch.randn(2, T, WIDTH, dtype=torch.float64)
    none = torch.zeros(2, T, dtype=torch.bool)
    close(layer(x, rows(2, None)), quadratic(layer, x, none))
    changed = x.clone()
    changed[:, 20] += 1
    assert torch.equal(layer(x, rows(2, None))[:, :20], layer(changed, rows(2, None))[:, :20])
    with_prefix = [layer(z, rows(2, first([22, 22]))) for z in (x, changed)]
    assert (with_prefix[0] - with_prefix[1]).abs().amin(dim=(0, 2)).max() > 0
    assert not torch.equal(with_prefix[0][:, 0], with_prefix[1][:, 0])  # the first token sees the twentieth


@both_types
def test_equals_the_recurrence(dtype):
    """One token after the other from the sums over the prefix, by the step-by-step definition of `ssd`."""
    layer, x, prefix = mixer(dtype), torch.randn(2, T, WIDTH, dtype=dtype), first([M, 4])
    q, k, v, ek, ev = (heads(getattr(layer, f"{n}_proj"), x) for n in ("q", "k", "v", "encoder_k", "encoder_v"))
    q, k, ek = map(features, (q, k, ek))
    S = torch.einsum("bhtp,bhtn,bt->bhpn", ev, ek, prefix.to(dtype))
    z = torch.einsum("bhtn,bt->bhn", ek, prefix.to(dtype))
    ys = []
    for t in range(T):
        S = S + v[:, :, t, :, None] * k[:, :, t, None, :]
        z = z + k[:, :, t]
        ys.append((S @ q[:, :, t, :, None])[..., 0] / (z * q[:, :, t]).sum(-1, keepdim=True))
    want = layer.o_proj(torch.stack(ys, dim=1).flatten(2))
    states: dict[str, torch.Tensor] = {}
    close(layer(x, rows(2, prefix), states), want)
    close(states["linear"][:, :, :-1], S)
    close(states["linear"][:, :, -1], z)
    assert states["linear"].numel() * 4 == 2 * layer.state_bytes(T)


def test_no_decay_is_exact_in_every_backend():
    v, k, q = torch.randn(1, 40, 2, 3), torch.randn(1, 40, 2, 5), torch.randn(1, 40, 2, 5)
    ones, zeros = torch.ones(1, 40, 2), torch.zeros(2)
    sums = torch.einsum("bthp,bthn->bthpn", v.double(), k.double()).cumsum(1)
    want = torch.einsum("bthpn,bthn->bthp", sums, q.double()).float()
    for backend in ("reference", "chunked", "triton"):
        y, _ = ssd(v, ones, zeros, k, q, backend=backend, chunk_size=16)
        assert (y - want).abs().max() < 1e-5 * want.abs().max(), backend


# models


@both_types
@pytest.mark.parametrize("sizes", [[M, 16], [M + 2, *[1] * 14], [T]], ids=str)
@torch.no_grad()
def test_a_prefix_then_steps_equal_the_full_forward(dtype, sizes):
    model, ids = build(dtype), torch.randint(0, 37, (2, T))
    full = model(ids, prefix=M).logits
    assert (full - model(ids).logits).abs().max() > 0.1
    cache, logits = RiverrunCache(2), []
    for i, piece in enumerate(ids.split(sizes, dim=1)):
        logits.append(model(piece, past_key_values=cache, prefix=M if i == 0 else None).logits)
    close(torch.cat(logits, dim=1), full)


@torch.no_grad()
def test_padding_changes_nothing():
    model, ids = build(), torch.randint(0, 37, (3, T))
    lengths, limit = [T, 19, 7], 12
    mask = torch.stack([torch.arange(T) >= T - n for n in lengths]).long()
    ends = torch.tensor([T - n + min(n, limit) for n in lengths])
    cache = RiverrunCache(2)
    padded = model(ids, attention_mask=mask, prefix=ends, past_key_values=cache).logits
    more = model(ids[:, :1], attention_mask=torch.ones(3, T + 1), past_key_values=cache).logits
    for row, n in enumerate(lengths):
        own = RiverrunCache(2)
        close(
            padded[row, T - n :],
            model(ids[row : row + 1, T - n :], prefix=min(n, limit), past_key_values=own).logits[0],
        )
        close(more[row], model(ids[row : row + 1, :1], past_key_values=own).logits[0])


@torch.no_grad()
def test_packed_documents_have_prefixes_of_their_own():
    model, ids, bounds = build(), torch.randint(0, 37, (2, 20)), [0, 4, 20, 29, 33, 40]
    packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), prefix=11).logits.flatten(0, 1)
    for start, stop in itertools.pairwise(bounds):
        inside = max(0, min(stop, start // 20 * 20 + 11) - start)  # of the document, in the row's first 11 tokens
        close(packed[start:stop], model(ids.flatten()[None, start:stop], prefix=inside).logits[0])


def test_every_weight_learns_and_recomputing_changes_no_gradient():
    found = []
    for recompute in (False, True):
        model, ids = build().train(), torch.randint(0, 37, (2, 20), generator=torch.Generator().manual_seed(0))
        model.set_recompute(recompute)
        model(ids, targets=ids.roll(-1, 1), prefix=9).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad.abs().max() > 0 and torch.equal(grad, found[1][name]), name


def test_impossible_prefixes_are_refused():
    model, ids = build(), torch.randint(0, 37, (1, 8))
    cache = model(ids, use_cache=True, prefix=4).past_key_values
    for given in ({"past_key_values": cache, "prefix": 2}, {"prefix": 9}):
        with pytest.raises(ValueError, match="within the first call of a cache"):
            model(ids, **given)
    causal = build(prefix_linear_attention=replace(OPTIONS, encoder=False))
    assert not any("encoder" in name for name, _ in causal.named_parameters())
    with pytest.raises(ValueError, match="no layer of this model can read a prefix"):
        causal(ids, prefix=4)
    causal(ids, prefix=0)


def test_generate_reads_the_prefix_once():
    model, ids = build(), torch.randint(0, 37, (2, 9))
    made = model.generate(ids, prefix=9, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for t in range(9, 14):
        assert torch.equal(made[:, t], model(made[:, :t], prefix=9).logits[:, -1].argmax(-1))
    assert not torch.equal(made, model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
