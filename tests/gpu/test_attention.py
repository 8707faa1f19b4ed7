"""Attention of shared rows through torch's flash kernels, against plain torch in float64 of the same numbers."""

import functools
from unittest import mock

import pytest
import torch

from riverrun.modeling import attention_block
from riverrun.modeling.attention_block import Block
from riverrun.modeling.parallel import attention, collectives, ring
from riverrun.modeling.persistent_attention import persistent_attention
from tests.modeling.parallel import test_attention as rows
from tests.ranks import Group

ROWS, HEADS = 2, 4
DOCUMENTS = [0, 1, 70, 256, 300, 512]


def draw(kv_heads, dim, queries, keys, dtype):
    torch.manual_seed(3)
    shapes = [(HEADS, queries), (kv_heads, keys), (kv_heads, keys), (HEADS, queries), (HEADS, queries)]
    return [torch.randn(ROWS, heads, length, dim, device="cuda").to(dtype) for heads, length in shapes]


def close(got, want, tolerance=2e-2):
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * max(1, want.norm())  # a window of 1 has gradients of zero


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "distance", "window", "documents"),
    [
        (256, 256, 0, None, None),
        (256, 256, 0, 5, None),
        (256, 256, 0, 1000, None),
        (256, 256, 0, None, DOCUMENTS),
        (256, 256, 0, 33, DOCUMENTS),
        (130, 70, 70, None, None),
        (130, 70, 326, None, None),
        (1, 256, 256, None, None),
        (63, 63, 63, 64, None),  # the last query sees one key, the first all
        (256, 70, 70, 1000, None),
        (30, 100, 300, 301, None),
        (1, 1, 99, 100, None),
        (200, 50, 50, 230, None),  # many queries, few keys
        (54, 9, 9, 62, None),
        (60, 50, 114, 164, None),
        (120, 3, 67, 189, None),
    ],
)
def test_flash_computes_what_plain_torch_does(kv_heads, dim, dtype, queries, keys, distance, window, documents):
    q, k, v, grad, whole = draw(kv_heads, dim, queries, keys, dtype)
    bounds = None if documents is None else torch.tensor(documents, dtype=torch.int32, device="cuda")
    block = Block(distance, window, bounds, 212)
    assert attention_block._is_flash(q, k, v)
    y, z = attention_block.attend(q, k, v, block)
    want_y, want_z = attention_block.attend(q.double(), k.double(), v.double(), block)
    assert y.dtype == dtype and z.dtype == torch.float32
    close(y, want_y)
    torch.testing.assert_close(z.double(), want_z, atol=1e-2, rtol=0)
    # of a softmax that this block is but a part of
    log_z = want_z + torch.rand_like(want_z)
    grads = attention_block.differentiate(grad, q, k, v, whole, log_z.float(), block)
    wants = attention_block.differentiate(*(x.double() for x in (grad, q, k, v, whole)), log_z, block)
    for got, want in zip(grads, wants, strict=True):
        close(got, want)


def part(staged, *args):
    """`rows.part` on a rank; `staged`: over gloo, which carries nothing between GPUs, by way of the CPU."""

    def send(tensors, axis, step, send=ring._send):
        receive = send([t.cpu() for t in tensors], axis, step)
        return lambda: [t.cuda() for t in receive()]

    def all_to_all(x, axis, split, join):
        return collectives.all_to_all(x.cpu(), axis, split, join).cuda()

    taken = []

    def is_flash(q, k, v, is_flash=attention_block._is_flash):
        taken.append(is_flash(q, k, v))
        return taken[-1]

    with mock.patch.object(attention_block, "_is_flash", is_flash):
        if staged:
            with mock.patch.object(ring, "_send", send), mock.patch.object(attention, "all_to_all", all_to_all):
                results = rows.part(*args, "cuda")
        else:
            results = rows.part(*args, "cuda")
    assert all(taken), "not by flash kernels"
    return [[t.cpu() for t in result] for result in results]


def assert_near(results, bounds, windows, kv_heads, length):
    half = rows.draw(HEADS, kv_heads, length, torch.bfloat16)
    *tensors, upstream = [t.double() for t in half]
    for i, window in enumerate(windows):
        seen = rows.mask(bounds, window, length)
        want = rows.gradients(functools.partial(rows.attention, seen=seen), tensors, upstream)
        for got, exact in zip(zip(*(r[i] for r in results)), want, strict=True):
            close(torch.cat(got, dim=2), exact)


LENGTH, WINDOWS = 256, [None, 1, 40, 100]
shared = pytest.mark.parametrize(
    ("method", "bounds", "kv_heads"),
    [
        ("ring", [0, 256, 512], 2),
        ("ring", [0, 3, 70, 256, 257, 512], 1),
        ("ulysses", [0, 256, 512], 2),
        ("ulysses", [0, 3, 70, 256, 257, 512], 4),
    ],
)


@pytest.fixture(scope="module")
def gloo():
    group = Group(4)
    yield group
    group.stop()


@shared
def test_four_ranks_on_one_gpu(gloo, method, bounds, kv_heads):
    results = gloo.run(part, True, bounds, WINDOWS, method, HEADS, kv_heads, torch.bfloat16, LENGTH)
    assert_near(results, bounds, WINDOWS, kv_heads, LENGTH)


@pytest.fixture(scope="module")
def nccl():
    group = Group(2, "nccl")
    yield group
    group.stop()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@shared
def test_two_gpus(nccl, method, bounds, kv_heads):
    results = nccl.run(part, False, bounds, WINDOWS, method, HEADS, kv_heads, torch.bfloat16, LENGTH)
    assert_near(results, bounds, WINDOWS, kv_heads, LENGTH)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("persistent", [1, 4, 130])
@pytest.mark.parametrize(("window", "documents"), [(None, None), (33, None), (33, DOCUMENTS)])
def test_persistent_keys_by_flash(kv_heads, persistent, window, documents):
    q, k, v, grad, _ = draw(kv_heads, 64, 256, 256, torch.bfloat16)
    shown = torch.randn(2, kv_heads, persistent, 64, device="cuda").bfloat16().unbind()
    bounds = None if documents is None else torch.tensor(documents, dtype=torch.int32, device="cuda")
    attend = functools.partial(persistent_attention, window=window, cu_seqlens=bounds, longest=256)
    got = rows.gradients(attend, [q, k, v, *shown], grad)
    want = rows.gradients(attend, [t.double() for t in (q, k, v, *shown)], grad.double())
    for g, w in zip(got, want, strict=True):
        close(g, w)
