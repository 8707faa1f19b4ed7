"""Attention of rows that several ranks share, both ways, against its definition on one process."""

import functools
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from riverrun.modeling import attention_block
from riverrun.modeling.layout import Layout
from riverrun.modeling.parallel import ring
from riverrun.modeling.parallel.attention import context_attention
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import Axis, Mesh
from tests.modeling.parallel.test_context import LAYOUTS

ROWS, LENGTH, DIM = 2, 16, 8
WINDOWS = [None, 1, 3, 7, 12, 100]

worlds = pytest.mark.parametrize("world", [2, 4])
methods = pytest.mark.parametrize("method", ["ulysses", "ring"])
layouts = pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS)


def draw(heads, kv_heads, length=LENGTH, dtype=torch.float64):
    """q, k, v, and the gradient of the loss by the output."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(ROWS, n, length, DIM) for n in (heads, kv_heads, kv_heads, heads)]
    tensors = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype) for t in tensors]


def mask(bounds, window, length=LENGTH):
    """(ROWS, 1, length, length) which keys each query sees, token by token."""
    document = [sum(b <= t for b in bounds) for t in range(ROWS * length)]
    seen = torch.zeros(ROWS, 1, length, length, dtype=torch.bool)
    for b in range(ROWS):
        for query in range(length):
            for key in range(query + 1):
                near = window is None or query - key < window
                seen[b, 0, query, key] = near and document[b * length + query] == document[b * length + key]
    return seen


def attention(q, k, v, seen):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def gradients(function, tensors, upstream):
    """The function's value, and the gradients of the tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    y.backward(upstream)
    return [y.detach(), *(t.grad for t in leaves)]


@functools.cache
def ranks_of(world, device="cpu"):
    return Mesh.of(device, world, cp=world).cp


def shard(tensors, axis):
    return [t[:, :, axis.share(t.shape[2])] for t in tensors]


def part(
    bounds,
    windows,
    method,
    heads,
    kv_heads,
    dtype,
    length=LENGTH,
    device="cpu",
    score_bytes=attention_block.SCORE_BYTES,
):
    """On a rank, for each window: its part of the output, and its tokens' gradients."""
    axis = ranks_of(torch.distributed.get_world_size(), device)
    layout = Layout.of_shard(Context.of_rows(axis, ROWS, length, bounds, device, attention=method))
    *tensors, upstream = shard([t.to(device) for t in draw(heads, kv_heads, length, dtype)], axis)
    results = []
    for window in windows:
        with mock.patch.object(attention_block, "SCORE_BYTES", score_bytes):
            results.append(gradients(lambda *qkv, w=window: context_attention(layout, *qkv, w), tensors, upstream))
            with torch.no_grad():
                torch.testing.assert_close(context_attention(layout, *tensors, window), results[-1][0])
    return results


def assert_exact(results, bounds, windows, heads, kv_heads, dtype=torch.float64):
    *tensors, upstream = draw(heads, kv_heads, dtype=dtype)
    for i, window in enumerate(windows):
        whole = gradients(functools.partial(attention, seen=mask(bounds, window)), tensors, upstream)
        for name, want, *shards in zip(("y", "q", "k", "v"), whole, *(r[i] for r in results)):
            got = torch.cat(shards, dim=2)
            error, scale = (got - want).abs().max(), want.abs().max()
            assert got.dtype == dtype
            assert error <= {torch.float64: 1e-12, torch.float32: 1e-5}[dtype] * (1 + scale), (window, name, error)


@worlds
@methods
@layouts
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_ranks_attend_as_one(ranks, world, method, bounds, kv_heads):
    results = ranks(world).run(part, bounds, WINDOWS, method, 4, kv_heads, torch.float64)
    assert_exact(results, bounds, WINDOWS, 4, kv_heads)


@worlds
@methods
@layouts
def test_in_single_precision(ranks, world, method, bounds):
    results = ranks(world).run(part, bounds, [None, 7], method, 4, 2, torch.float32)
    assert_exact(results, bounds, [None, 7], 4, 2, torch.float32)


@worlds
@layouts
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_heads_that_do_not_divide_take_the_ring(ranks, world, bounds, kv_heads):
    results = ranks(world).run(part, bounds, WINDOWS, "auto", 3, kv_heads, torch.float64)
    assert_exact(results, bounds, WINDOWS, 3, kv_heads)


@layouts
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_at_a_time(ranks, bounds, queries):
    """Scores are computed for parts of the queries."""
    score_bytes = queries * 8 * ROWS * 4 * (LENGTH // 4)
    results = ranks(4).run(part, bounds, WINDOWS, "ring", 4, 2, torch.float64, LENGTH, "cpu", score_bytes)
    assert_exact(results, bounds, WINDOWS, 4, 2)


def refuse(heads, kv_heads):
    with pytest.raises(ValueError) as raised:
        part([0, 16, 32], [None], "ulysses", heads, kv_heads, torch.float64)
    return str(raised.value)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (12, 6)])
def test_ulysses_needs_heads_that_divide(ranks, heads, kv_heads):
    for message in ranks(4).run(refuse, heads, kv_heads):
        assert f"{heads} heads and {kv_heads} key heads" in message
        assert "parallel.cp=4" in message and "parallel.attention='ring'" in message


def two_layers(attend, q, k, v):
    """The second layer's queries, keys and values come from the first's output."""
    y = q + checkpoint(attend, q, k, v, use_reentrant=False)
    few = y[:, :: q.shape[1] // k.shape[1]]
    return checkpoint(attend, y, k + few, v - few, use_reentrant=False)


def recomputed(bounds, window, method):
    axis = ranks_of(torch.distributed.get_world_size())
    layout = Layout.of_shard(Context.of_rows(axis, ROWS, LENGTH, bounds, "cpu", attention=method))
    *tensors, upstream = shard(draw(4, 2), axis)
    attend = functools.partial(context_attention, layout, window=window)
    return [gradients(functools.partial(two_layers, attend), tensors, upstream)]


@worlds
@methods
@layouts
@pytest.mark.parametrize("window", [None, 5])
def test_two_layers_recomputed(ranks, world, method, bounds, window):
    results = ranks(world).run(recomputed, bounds, window, method)
    *tensors, upstream = draw(4, 2)
    attend = functools.partial(attention, seen=mask(bounds, window))
    for want, *shards in zip(
        gradients(functools.partial(two_layers, attend), tensors, upstream), *(r[0] for r in results)
    ):
        torch.testing.assert_close(torch.cat(shards, dim=2), want)


def test_bfloat16_is_as_near_as_sdpa(ranks):
    length, bounds = 128, [0, 5, 128, 256]
    results = ranks(4).run(part, bounds, [None], "ring", 4, 2, torch.bfloat16, length)
    half, exact = (draw(4, 2, length, dtype) for dtype in (torch.bfloat16, torch.float64))
    *exact, upstream = [t.to(torch.float64) for t in half]
    seen = mask(bounds, None, length)
    want = gradients(functools.partial(attention, seen=seen), exact, upstream)
    sdpa = functools.partial(F.scaled_dot_product_attention, attn_mask=seen, enable_gqa=True)
    theirs = gradients(sdpa, half[:3], half[3])
    ours = [torch.cat(shards, dim=2) for shards in zip(*(r[0] for r in results))]
    for our, their, exact in zip(ours, theirs, want, strict=True):
        assert our.dtype == torch.bfloat16
        error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (our, their))
        assert error <= 1.2 * allowed


def sends(bounds, window):
    """On a rank: how many steps round the ring each of its messages goes, forward and backward."""
    steps, send = [], ring._send
    with mock.patch.object(ring, "_send", lambda tensors, axis, step: steps.append(step) or send(tensors, axis, step)):
        part(bounds, [window], "ring", 4, 2, torch.float64)
    return steps


@pytest.mark.parametrize(
    ("bounds", "window", "hops"),
    [
        ([0, 16, 32], None, 3),
        ([0, 16, 32], 1, 0),
        ([0, 16, 32], 2, 1),
        ([0, 16, 32], 5, 1),
        ([0, 16, 32], 6, 2),
        ([0, 16, 32], 9, 2),
        ([0, 16, 32], 10, 3),
        ([0, 4, 9, 16, 20, 32], None, 2),
        ([0, 4, 9, 16, 20, 32], 5, 1),
        ([0, 4, 8, 12, 16, 20, 24, 28, 32], None, 0),
    ],
)
def test_keys_go_no_further_than_they_are_seen(ranks, bounds, window, hops):
    keys = [1] * hops  # in the forward pass, in the backward pass and without gradients
    gradients = [1] * (hops - 1) + [-hops] if hops else []
    for steps in ranks(4).run(sends, bounds, window):
        assert sorted(steps) == sorted(3 * keys + gradients)


@layouts
@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_hold_what_is_seen_and_no_more(bounds, window):
    """Every pair of tokens that see each other is in one block of one rank."""
    T, size = LENGTH // 4, 4
    seen = torch.zeros(ROWS, 1, LENGTH, LENGTH, dtype=torch.int64)
    for rank in range(size):
        context = Context.of_rows(Axis(size, rank), ROWS, LENGTH, bounds, "cpu")
        own = mask(bounds, window)[..., rank * T : (rank + 1) * T, rank * T : (rank + 1) * T]
        seen[..., rank * T : (rank + 1) * T, rank * T : (rank + 1) * T] += own
        for step in range(1, size):
            for rows, queries, keys, block in ring._blocks(context, step, window):
                query = rank * T + torch.arange(T)[queries]
                key = (rank - step) * T + torch.arange(T)[keys]
                assert block.distance == query[0] - key[0] and block.window == window
                near = query[:, None] - key < (window or LENGTH)
                assert near.any(dim=1).all(), "a query that sees nothing"
                seen[rows, 0, query[0] : query[-1] + 1, key[0] : key[-1] + 1] += near
    assert torch.equal(seen, mask(bounds, window).long())


def test_autocast_has_no_say():
    q, k, v, upstream = draw(4, 2, dtype=torch.float32)
    block = attention_block.Block(0, 5, torch.tensor([0, 3, 16, 32], dtype=torch.int32), 16)

    def run():
        y, z = attention_block.attend(q, k, v, block)
        return [y, z, *attention_block.differentiate(upstream, q, k, v, y, z, block)]

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
