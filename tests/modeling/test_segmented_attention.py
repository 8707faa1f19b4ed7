"""Attention of a segment to persistent keys, a memory's reads and itself: token by token, of what each one sees."""

import functools
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from riverrun.modeling import segmented_attention as module
from riverrun.modeling.segmented_attention import segmented_attention
from tests.modeling.parallel.test_attention import gradients

SEQUENCES, HEADS, TOKENS, DIM = 2, 4, 7, 8


def draw(kv_heads, persistent, tokens=TOKENS, dtype=torch.float64):
    """q, k, v, keys and values of reads, of persistent ones, and the gradient of the loss by the output."""
    generator = torch.Generator().manual_seed(4)
    own = [(SEQUENCES, heads, tokens, DIM) for heads in (HEADS, *[kv_heads] * 4)]
    shapes = [*own, *[(kv_heads, persistent, DIM)] * 2, own[0]]
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_token(q, k, v, memory_k, memory_v, persistent_k, persistent_v):
    """The definition: token i's softmax, over all persistent ones and the reads and tokens up to i."""
    R = q.shape[1] // k.shape[1]
    persistent_k, persistent_v = (x.expand(len(q), -1, -1, -1) for x in (persistent_k, persistent_v))
    out = []
    for i in range(q.shape[2]):
        keys = torch.cat([persistent_k, memory_k[:, :, : i + 1], k[:, :, : i + 1]], dim=2).repeat_interleave(R, 1)
        values = torch.cat([persistent_v, memory_v[:, :, : i + 1], v[:, :, : i + 1]], dim=2).repeat_interleave(R, 1)
        scores = torch.einsum("nhd,nhsd->nhs", q[:, :, i], keys) / DIM**0.5
        out.append(torch.einsum("nhs,nhsd->nhd", scores.softmax(-1), values))
    return torch.stack(out, dim=2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("persistent", [0, 1, 3])
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_it_is_one_softmax(kv_heads, persistent, tokens):
    *tensors, upstream = draw(kv_heads, persistent, tokens)
    want = gradients(by_token, tensors, upstream)
    for g, w in zip(gradients(segmented_attention, tensors, upstream), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_none_is_as_good_as_no_persistent_keys():
    *tensors, upstream = draw(2, 0)
    none = functools.partial(segmented_attention, persistent_k=None, persistent_v=None)
    want = gradients(segmented_attention, tensors, upstream)
    for g, w in zip(gradients(none, tensors[:5], upstream), want[:6], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("new", [1, 3])
def test_decoding_is_the_whole(kv_heads, persistent, new):
    q, *keys, persistent_k, persistent_v, _ = draw(kv_heads, persistent)
    whole = segmented_attention(q, *keys, persistent_k, persistent_v)
    for start in range(TOKENS - new + 1):
        so_far = [x[:, :, : start + new] for x in keys]
        y = segmented_attention(q[:, :, start : start + new], *so_far, persistent_k, persistent_v, start)
        torch.testing.assert_close(y, whole[:, :, start : start + new], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("new", [1, 3])
def test_sequences_at_different_places(new):
    """In room for a whole segment, which holds anything after their tokens."""
    q, *keys, persistent_k, persistent_v, _ = draw(2, 3)
    whole = segmented_attention(q, *keys, persistent_k, persistent_v)
    for starts in ([0, 0], [2, 4], [4, 1]):
        places = [slice(start, start + new) for start in starts]
        room = [x.clone() for x in keys]
        for x in room:
            for n, place in enumerate(places):
                x[n, :, place.stop :] = 1e6
        asking = torch.stack([q[n, :, place] for n, place in enumerate(places)])
        y = segmented_attention(asking, *room, persistent_k, persistent_v, torch.tensor(starts))
        want = torch.stack([whole[n, :, place] for n, place in enumerate(places)])
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


def test_queries_have_keys():
    q, *others, _ = draw(2, 3)
    with pytest.raises(AssertionError):
        segmented_attention(q, *others, 1)


def changes(kv_heads=2):
    """(T, T): whether an output i differs in any bit when token j does, with its query, key, value and read."""
    *tensors, _ = draw(kv_heads, 3)
    before = segmented_attention(*tensors)
    changed = []
    for j in range(TOKENS):
        others = [t.clone() for t in tensors]
        for t in others[:5]:
            t[:, :, j] += 1
        changed.append((segmented_attention(*others) != before).transpose(1, 2).flatten(2).any(2).any(0))
    return torch.stack(changed, dim=1)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_no_token_sees_the_future(kv_heads):
    assert torch.equal(changes(kv_heads), torch.ones(TOKENS, TOKENS).tril().bool())


def test_the_test_of_causality_finds_the_leak_through_reads():
    """The mask as the paper prints it: reads stand before all tokens, which therefore see them all."""

    def seen(start, queries, tokens, persistent, device, seen=module._seen):
        mask = seen(start, queries, tokens, persistent, device)
        mask[..., persistent : persistent + tokens] = True
        return mask

    with mock.patch.object(module, "_seen", seen):
        assert changes().all(), "every token sees every read"


@pytest.mark.parametrize("read", [True, False])
def test_a_read_is_seen_from_its_token_on(read):
    """As is the token itself, by itself."""
    *tensors, _ = draw(2, 0)
    before = segmented_attention(*tensors)
    for j in range(TOKENS):
        values = tensors[4 if read else 2].clone()
        values[:, :, j] += 1
        others = [*tensors[:4], values, *tensors[5:]] if read else [*tensors[:2], values, *tensors[3:]]
        changed = (segmented_attention(*others) != before).any(3)
        assert torch.equal(changed, (torch.arange(TOKENS) >= j).expand_as(changed))


def test_parameters_in_single_precision_beside_bfloat16():
    *tensors, upstream = draw(2, 3, dtype=torch.bfloat16)
    want = gradients(by_token, [t.double() for t in tensors], upstream.double())
    mixed = [*tensors[:5], *(t.float() for t in tensors[5:])]
    got = gradients(segmented_attention, mixed, upstream)
    assert [t.dtype for t in got] == [torch.bfloat16] * 6 + [torch.float32] * 2
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= 2e-2 * w.norm()


def test_groups_of_heads_are_in_torchs_order():
    q, k, v, memory_k, memory_v, persistent_k, persistent_v, _ = draw(2, 3)
    keys, values = (
        torch.cat([p.expand(SEQUENCES, -1, -1, -1), m, x], dim=2)
        for p, m, x in ((persistent_k, memory_k, k), (persistent_v, memory_v, v))
    )
    seen = torch.ones(TOKENS, TOKENS).tril().bool()
    seen = torch.cat([torch.ones(TOKENS, 3).bool(), seen, seen], dim=1)
    want = F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True)
    torch.testing.assert_close(segmented_attention(q, k, v, memory_k, memory_v, persistent_k, persistent_v), want)
