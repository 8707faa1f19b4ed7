"""What is computed once a batch: remembered with its tensor, and not beyond."""

import gc
import weakref

import torch

from riverrun.kernels.common.documents import once_a_batch
from riverrun.kernels.common.triton_chunks import pieces


def counted():
    calls = []

    @once_a_batch
    def lengths(cu_seqlens, size):
        calls.append(size)
        return cu_seqlens.diff() + size

    return lengths, calls


def test_is_computed_once_for_a_tensor_and_sizes():
    lengths, calls = counted()
    bounds, equal = (torch.tensor([0, 3, 8]) for _ in range(2))
    assert lengths(bounds, 1) is lengths(bounds, 1) and calls == [1]
    assert lengths(bounds, 2).tolist() == [5, 7] and lengths(equal, 1).tolist() == [4, 6] and calls == [1, 2, 1]


def test_is_computed_anew_when_the_numbers_change():
    lengths, _ = counted()
    bounds = torch.tensor([0, 3, 8])
    lengths(bounds, 0)
    bounds[1] = 5
    assert lengths(bounds, 0).tolist() == [5, 3]


def test_of_inference_tensors_nothing_is_remembered():
    lengths, calls = counted()
    with torch.inference_mode():
        bounds = torch.tensor([0, 3, 8])
        assert lengths(bounds, 0).tolist() == lengths(bounds, 0).tolist() == [3, 5] and calls == [0, 0]


def test_is_gone_with_its_tensor():
    lengths, _ = counted()
    bounds = torch.tensor([0, 3, 8])
    found = weakref.ref(lengths(bounds, 0))
    assert found() is not None
    del bounds
    gc.collect()
    assert found() is None


def test_a_backward_pass_finds_what_the_forward_pass_computed():
    found = []

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, cu_seqlens):
            ctx.save_for_backward(cu_seqlens)
            found.append(pieces(cu_seqlens, 2, 6))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(pieces(ctx.saved_tensors[0], 2, 6))
            return grad, None

    x, bounds = torch.ones(3, requires_grad=True), torch.tensor([0, 3, 8], dtype=torch.int32)
    Chunked.apply(x, bounds).sum().backward()
    assert found[0] is found[1]
