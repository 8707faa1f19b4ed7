"""Attention beside persistent keys, on one process and on ranks that share rows, against one softmax under a mask."""

import functools
import itertools
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from riverrun.modeling import attention_block
from riverrun.modeling.attention_block import self_attention
from riverrun.modeling.layout import Layout
from riverrun.modeling.parallel.attention import context_attention
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.persistent_attention import masked_persistent_attention, persistent_attention
from tests.modeling.parallel import test_attention as rows
from tests.modeling.parallel.test_attention import DIM, LENGTH, ROWS, WINDOWS, gradients, layouts, methods, worlds

HEADS = 4


def draw(kv_heads, persistent, heads=HEADS, length=LENGTH, dtype=torch.float64):
    """q, k, v, persistent keys and values, and the gradient of the loss by the output."""
    q, k, v, upstream = rows.draw(heads, kv_heads, length, dtype)
    generator = torch.Generator().manual_seed(6)
    shown = 2 * torch.randn(2, kv_heads, persistent, DIM, generator=generator, dtype=torch.float64)
    return [q, k, v, *shown.to(dtype).unbind(), upstream]


def softmax(q, k, v, persistent_k, persistent_v, seen):
    """The definition; `seen` (B, 1, T, S) of the tokens."""
    k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], dim=2) for p, x in ((persistent_k, k), (persistent_v, v)))
    always = torch.ones(*seen.shape[:3], persistent_k.shape[1], dtype=torch.bool)
    return rows.attention(q, k, v, torch.cat([always, seen], dim=3))


def packed(bounds, window):
    """The attention of rows of documents."""
    cu_seqlens = None if len(bounds) == ROWS + 1 else torch.tensor(bounds, dtype=torch.int32)
    longest = max(end - begin for begin, end in itertools.pairwise(bounds))
    return functools.partial(persistent_attention, window=window, cu_seqlens=cu_seqlens, longest=longest)


def assert_close(got, want, case=None):
    """Outputs and gradients, to rounding in float64."""
    names = ("y", "q", "k", "v", "persistent_k", "persistent_v")
    for name, g, w in zip(names[: len(got)], got, want, strict=True):
        assert g.shape == w.shape and g.dtype == torch.float64
        error, scale = ((x.abs().max().item() if x.numel() else 0.0) for x in (g - w, w))
        assert error <= 1e-12 * (1 + scale), (case, name, error)


@layouts
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("persistent", [1, 3, 20])
def test_it_is_one_softmax(bounds, kv_heads, persistent):
    *tensors, upstream = draw(kv_heads, persistent)
    for window in WINDOWS:
        want = gradients(functools.partial(softmax, seen=rows.mask(bounds, window)), tensors, upstream)
        assert_close(gradients(packed(bounds, window), tensors, upstream), want, window)


@layouts
@pytest.mark.parametrize("window", [None, 5])
def test_without_persistent_keys_it_is_self_attention(bounds, window):
    q, k, v, *none, upstream = draw(2, 0)
    attend = packed(bounds, window)
    want = gradients(functools.partial(self_attention, **attend.keywords), (q, k, v), upstream)
    for persistent in (none, (None, None)):
        given = functools.partial(attend, persistent_k=persistent[0], persistent_v=persistent[1])
        got = gradients(given, (q, k, v), upstream)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert_close(got, gradients(functools.partial(rows.attention, seen=rows.mask(bounds, window)), (q, k, v), upstream))


@layouts
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_at_a_time(bounds, queries):
    """Scores are computed for parts of the queries."""
    *tensors, upstream = draw(2, 3)
    want = gradients(functools.partial(softmax, seen=rows.mask(bounds, 7)), tensors, upstream)
    with mock.patch.object(attention_block, "SCORE_BYTES", queries * 8 * ROWS * HEADS * LENGTH):
        assert_close(gradients(packed(bounds, 7), tensors, upstream), want)


def test_one_token():
    q, k, v, *shown, upstream = draw(2, 3)
    tensors, upstream = [q[:, :, :1], k[:, :, :1], v[:, :, :1], *shown], upstream[:, :, :1]
    seen = torch.ones(ROWS, 1, 1, 1, dtype=torch.bool)
    attend = functools.partial(persistent_attention, window=None, cu_seqlens=None, longest=1)
    assert_close(
        gradients(attend, tensors, upstream), gradients(functools.partial(softmax, seen=seen), tensors, upstream)
    )


def test_scores_far_apart():
    """The sums of the two blocks do not overflow, and either may be all of the softmax."""
    q, k, v, persistent_k, persistent_v, upstream = draw(2, 3)
    for factor in (1e3, 1e-3):
        tensors = [q * 1e3, k / factor, v, persistent_k * factor, persistent_v]
        want = gradients(functools.partial(softmax, seen=rows.mask([0, 16, 32], 5)), tensors, upstream)
        got = gradients(packed([0, 16, 32], 5), tensors, upstream)
        for g, w in zip(got, want, strict=True):
            assert g.isfinite().all() and (g - w).abs().max() <= 1e-9 * (1 + w.abs().max())


def test_parameters_in_single_precision_beside_bfloat16():
    length, bounds = 128, [0, 5, 128, 256]
    *half, upstream = draw(2, 3, length=length, dtype=torch.bfloat16)
    exact = [t.double() for t in half]
    seen = rows.mask(bounds, 33, length)
    want = gradients(functools.partial(softmax, seen=seen), exact, upstream.double())

    def sdpa(q, k, v, persistent_k, persistent_v):
        k, v = (torch.cat([p.expand(ROWS, -1, -1, -1), x], dim=2) for p, x in ((persistent_k, k), (persistent_v, v)))
        return F.scaled_dot_product_attention(q, k, v, F.pad(seen, (3, 0), value=True), enable_gqa=True)

    theirs = gradients(sdpa, half, upstream)
    mixed = [*half[:3], *(t.float() for t in half[3:])]
    ours = gradients(packed(bounds, 33), mixed, upstream)
    assert [t.dtype for t in ours] == [torch.bfloat16] * 4 + [torch.float32] * 2
    for our, their, w in zip(ours, theirs, want, strict=True):
        error, allowed = ((x.double() - w).square().mean().sqrt() for x in (our, their))
        assert error <= 1.2 * allowed
    half_too = gradients(packed(bounds, 33), half, upstream)
    assert [t.dtype for t in half_too] == [torch.bfloat16] * 6
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(half_too, ours, strict=True))


@layouts
@pytest.mark.parametrize("window", [None, 1, 5])
def test_a_token_changes_those_that_see_it_and_no_others(bounds, window):
    tensors = draw(2, 3)[:-1]
    before, seen = packed(bounds, window)(*tensors), rows.mask(bounds, window)[:, 0]
    for b in range(ROWS):
        for j in range(LENGTH):
            q, k, v = (t.clone() for t in tensors[:3])
            for t in (q, k, v):
                t[b, :, j] += 1
            after = packed(bounds, window)(q, k, v, *tensors[3:])
            changed = (after != before).flatten(3).any(3).any(1)
            want = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
            want[b] = seen[b, :, j]
            assert torch.equal(changed, want), (b, j)
    persistent_k = tensors[3].clone()
    persistent_k[:, -1] += 1
    after = packed(bounds, window)(*tensors[:3], persistent_k, tensors[4])
    assert (after != before).any(3).any(1).all(), "a query that does not see a persistent key"


# decoding


def follow(tensors, window, past, new, valid=None):
    """The attention of `new` tokens that follow `past` cached ones, of which a window keeps the last."""
    q, k, v, *shown = tensors
    keep = past if window is None else min(past, window - 1)
    kept = slice(past - keep, past + new)
    layout = Layout.of_rows((ROWS, new), torch.full((ROWS,), past))
    mask = layout.attention_mask(window, None if valid is None else valid[:, past - keep : past], keep)
    y = masked_persistent_attention(q[:, :, past : past + new], k[:, :, kept], v[:, :, kept], *shown, mask)
    return y, mask


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("persistent", [None, 0, 3])
@pytest.mark.parametrize("new", [1, 3])
def test_decoding_is_the_whole(window, persistent, new):
    tensors = draw(2, persistent or 0)[:-1]
    if persistent is None:
        tensors[3:] = None, None
    whole = persistent_attention(*tensors, window, None, LENGTH)
    free = 0
    for past in range(1, LENGTH - new + 1):
        y, mask = follow(tensors, window, past, new)
        free += mask is None
        torch.testing.assert_close(y, whole[:, :, past : past + new], rtol=0, atol=1e-12)
    assert free or new > 1, "one token that sees all needs no mask"


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_after_left_padding(window):
    tensors = draw(2, 3)[:-1]
    attention_mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    attention_mask[0, :6] = 0
    layout = Layout.of_left_padded(attention_mask)
    whole = persistent_attention(*tensors, window, layout.cu_seqlens, LENGTH)
    for past in range(7, LENGTH):
        y, _ = follow(tensors, window, past, 1, attention_mask.bool())
        torch.testing.assert_close(y, whole[:, :, past : past + 1], rtol=0, atol=1e-12)


# rows that several ranks share


def part(bounds, windows, method, heads, kv_heads, persistent):
    """On a rank, for each window: its part of the output, its tokens' gradients, its part of the persistent ones'."""
    axis = rows.ranks_of(torch.distributed.get_world_size())
    layout = Layout.of_shard(Context.of_rows(axis, ROWS, LENGTH, bounds, "cpu", attention=method))
    *tokens, persistent_k, persistent_v, upstream = draw(kv_heads, persistent, heads)
    *tokens, upstream = rows.shard([*tokens, upstream], axis)
    results = []
    for window in windows:

        def attend(q, k, v, persistent_k, persistent_v, window=window):
            return context_attention(layout, q, k, v, window, persistent_k, persistent_v)

        results.append(gradients(attend, [*tokens, persistent_k, persistent_v], upstream))
        with torch.no_grad():
            torch.testing.assert_close(attend(*tokens, persistent_k, persistent_v), results[-1][0])
    return results


def assert_parts_make_the_whole(results, bounds, windows, heads, kv_heads, persistent):
    *tensors, upstream = draw(kv_heads, persistent, heads)
    for i, window in enumerate(windows):
        parts = list(zip(*(r[i] for r in results)))
        got = [torch.cat(shards, dim=2) for shards in parts[:4]] + [sum(shards) for shards in parts[4:]]
        assert_close(got, gradients(packed(bounds, window), tensors, upstream), window)
        assert_close(got, gradients(functools.partial(softmax, seen=rows.mask(bounds, window)), tensors, upstream))


@worlds
@methods
@layouts
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_ranks_attend_as_one(ranks, world, method, bounds, kv_heads):
    results = ranks(world).run(part, bounds, WINDOWS, method, HEADS, kv_heads, 3)
    assert_parts_make_the_whole(results, bounds, WINDOWS, HEADS, kv_heads, 3)


@layouts
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_heads_that_do_not_divide_take_the_ring(ranks, bounds, kv_heads):
    results = ranks(2).run(part, bounds, WINDOWS, "auto", 3, kv_heads, 3)
    assert_parts_make_the_whole(results, bounds, WINDOWS, 3, kv_heads, 3)


def part_of_tokens(bounds, windows, method):
    """`rows.part`, given persistent keys, of which there are none."""
    none = torch.zeros(2, 2, 0, DIM, dtype=torch.float64).unbind()
    with mock.patch.object(rows, "context_attention", lambda *args: context_attention(*args, *none)):
        return rows.part(bounds, windows, method, HEADS, 2, torch.float64)


@methods
@layouts
def test_ranks_without_persistent_keys(ranks, method, bounds):
    results = ranks(2).run(part_of_tokens, bounds, WINDOWS, method)
    rows.assert_exact(results, bounds, WINDOWS, HEADS, 2)
