"""The Triton kernels of head_rnn on a GPU, against the step loop in float64 on the same card."""

import math

import pytest
import torch

from riverrun.kernels.head_rnn import head_rnn
from riverrun.kernels.head_rnn.cells import CELLS

every_cell = pytest.mark.parametrize("cell", CELLS)


def make_inputs(cell, B, T, H, K, S=None, dtype=torch.float32):
    G, NS = len(CELLS[cell].gates), len(CELLS[cell].states)
    state = torch.randn(S or B, NS, H, K, device="cuda")
    if cell == "slstm":
        state[:, 1] = state[:, 1].abs() + 1.5
    gates = torch.randn(B, T, G, H, K, device="cuda")
    weight = torch.randn(G, H, K, K, device="cuda") / (2 * math.sqrt(K))
    return [gates.to(dtype), weight.to(dtype), state]


def run(cell, inputs, dtype=None, **options):
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    h, final = head_rnn(leaves[0], leaves[1], cell, initial_state=leaves[2], **options)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in (h, final)]
    return [h, final, *torch.autograd.grad((h, final), leaves, upstream)]


def errors(cell, inputs, **options):
    want = run(cell, inputs, torch.float64, backend="reference", **options)
    got = run(cell, inputs, backend="triton", **options)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, want)]


@every_cell
@pytest.mark.parametrize("K", [16, 24, 32, 64])
def test_single_precision_equals_reference(cell, K):
    assert max(errors(cell, make_inputs(cell, 18, 40, 2, K))) <= 1e-4


@every_cell
@pytest.mark.parametrize("K", [16, 64, 128])
def test_bfloat16_is_near_the_reference(cell, K):
    """h is rounded before every product, which the reference does not do."""
    assert max(errors(cell, make_inputs(cell, 16, 60, 3, K, dtype=torch.bfloat16))) <= 3e-2


@every_cell
def test_documents(cell):
    lengths = [1, 2, 60, 1, 17, 3, 40, 5, 1, 8, 9, 10, 11, 12, 13, 14, 15, 16, 33]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    inputs = make_inputs(cell, 1, sum(lengths), 2, 32, S=len(lengths))
    assert max(errors(cell, inputs, cu_seqlens=bounds)) <= 1e-4


@every_cell
def test_same_bits_every_time_without_waiting_for_the_device(cell):
    inputs = make_inputs(cell, 1, 300, 4, 64, S=3, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 100, 101, 300], dtype=torch.int32, device="cuda")
    first = run(cell, inputs, backend="triton", cu_seqlens=bounds)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(cell, inputs, backend="triton", cu_seqlens=bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_wide_heads_take_the_batched_product():
    inputs = make_inputs("lstm", 2, 10, 1, 300)
    want = run("lstm", inputs, torch.float64, backend="reference")
    for a, b in zip(run("lstm", inputs), want):
        assert (a - b).norm() <= 1e-4 * b.norm()
