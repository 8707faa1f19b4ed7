"""Convolutions whose outputs have unit length by heads, on real shapes, against float64 on the same card."""

import pytest
import torch

from riverrun.kernels.causal_conv1d import causal_conv1d

DOCUMENTS = [0, 1, 2, 130, 131, 500, 777]


def make(B, T, D, dtype=torch.bfloat16):
    return [torch.randn(B, T, D, device="cuda").to(dtype), torch.randn(D, 4, device="cuda")]


def run(inputs, dtype=None, **options):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    y, state = causal_conv1d(*leaves, activation="silu", **options)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device="cuda").to(x) for x in (y, state)]
    return [y, state, *torch.autograd.grad([y, state], leaves, upstream)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "D, unit", [(2048, 128), (2048, 64), (2048, 512), (2048, 1024), (1536, 96), (1536, 192), (384, 128), (64, 16)]
)
def test_equals_float64(D, unit, packed, dtype, tolerance):
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32, device="cuda") if packed else None
    inputs, options = make(1 if packed else 2, 777, D, dtype), {"unit": unit, "cu_seqlens": bounds}
    want = run(inputs, torch.float64, backend="chunked", **options)
    for a, b in zip(run(inputs, **options), want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_long_rows():
    inputs = make(8, 4096, 2048)
    want = run(inputs, torch.float64, backend="chunked", unit=128)
    for a, b in zip(run(inputs, unit=128), want, strict=True):
        assert (a - b).norm() <= 6e-3 * b.norm()


def test_decoding_steps_equal_one_call():
    x, weight = make(4, 9, 2048, torch.float32)
    whole, last = causal_conv1d(x, weight, activation="silu", unit=128)
    state, ys = None, []
    for x_t in x.split(1, dim=1):
        y, state = causal_conv1d(x_t, weight, activation="silu", unit=128, initial_state=state)
        ys.append(y)
    torch.testing.assert_close((torch.cat(ys, 1), state), (whole, last), rtol=1e-5, atol=1e-6)


def test_same_bits_every_time_without_waiting_for_the_device():
    inputs, bounds = make(1, 777, 2048), torch.tensor(DOCUMENTS, dtype=torch.int32, device="cuda")
    first = run(inputs, unit=128, cu_seqlens=bounds)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(inputs, unit=128, cu_seqlens=bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again))
