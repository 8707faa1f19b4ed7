"""What whole sequences do to a state, against the step loop in float64: the final state from any initial one, and its
gradients."""

import pytest
import torch

from riverrun.kernels.diagonal_scan import diagonal_scan, diagonal_scan_summary
from riverrun.kernels.gated_delta import gated_delta, gated_delta_summary
from riverrun.kernels.ssd import ssd, ssd_summary

H, N = 4, 5
K, V = 4, 3
LENGTHS = [[1], [7], [64], [130], [1, 9, 1, 1, 17, 4], [64, 1, 70, 3]]

documents = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def assert_makes_the_final_state(mapped, wanted, leaves):
    """Both states and the gradients of a loss of theirs."""
    torch.testing.assert_close(mapped, wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(wanted)
    got = torch.autograd.grad(mapped, leaves, upstream)
    for g, want in zip(got, torch.autograd.grad(wanted, leaves, upstream)):
        torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-10)


@documents
@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("softplus", [False, True])
def test_ssd(lengths, G, softplus):
    T, S, P = sum(lengths), len(lengths), 3
    x, B, A, state = randn(1, T, H, P), randn(1, T, G, N), -randn(H).exp(), randn(S, H, P, N)
    dt, bias = (randn(1, T, H), randn(H)) if softplus else (0.3 * randn(1, T, H).exp(), None)
    leaves = [t.requires_grad_() for t in (x, dt, A, B, state, bias) if t is not None]
    options = {"dt_bias": bias, "dt_softplus": softplus, "cu_seqlens": bounds_of(lengths)}
    transfer, added = ssd_summary(x, dt, A, B, chunk_size=16, **options)
    _, wanted = ssd(x, dt, A, B, randn(1, T, G, N), initial_state=state, backend="reference", **options)
    assert_makes_the_final_state(transfer[..., None, None] * state + added, wanted, leaves)


def apply(transfer, state, added):
    return transfer @ state + added


@documents
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_gated_delta(lengths, n, gate):
    T, S = sum(lengths), len(lengths)
    k, v, state = randn(1, T, n, H, K), randn(1, T, n, H, V), randn(S, H, K, V)
    beta, g = 2 * torch.rand(1, T, n, H, dtype=torch.float64), -torch.rand(1, T, H, dtype=torch.float64)
    g = g if gate else None
    leaves = [t.requires_grad_() for t in (k, v, beta, g, state) if t is not None]
    options = {"qk_l2norm": True, "cu_seqlens": bounds_of(lengths)}
    transfer, added = gated_delta_summary(k, v, beta, g, chunk_size=16, **options)
    _, wanted = gated_delta(randn(1, T, H, K), k, v, beta, g, initial_state=state, backend="reference", **options)
    assert_makes_the_final_state(apply(transfer, state, added), wanted, leaves)
    none, alone = gated_delta_summary(k, v, beta, g, with_transfer=False, chunk_size=16, **options)
    assert none is None
    torch.testing.assert_close(alone, added, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_reflections_of_few_keys(n):
    """β = 2, no gate: nothing fades, and the transfer is orthogonal however long the sequence."""
    T = 130
    k = torch.nn.functional.normalize(randn(1, 1, n, H, K), dim=-1).repeat(1, T, 1, 1, 1)
    k[:, ::3] = k[:, ::3].flip(2).roll(1, -1)
    beta = torch.full((1, T, n, H), 2.0, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (k, randn(1, T, n, H, V), beta, randn(1, H, K, V))]
    transfer, added = gated_delta_summary(*leaves[:3])
    torch.testing.assert_close(transfer @ transfer.mT, torch.eye(K, dtype=torch.float64).expand_as(transfer))
    _, wanted = gated_delta(randn(1, T, H, K), *leaves[:3], initial_state=leaves[3], backend="reference")
    assert_makes_the_final_state(apply(transfer, leaves[3], added), wanted, leaves)


@documents
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_diagonal_scan(lengths, dtype, constant):
    T, S, D = sum(lengths), len(lengths), 5
    shape = (D,) if constant else (1, T, D)
    a = randn(*shape, dtype=dtype).sgn() * (1 - torch.rand(shape, dtype=torch.float64) ** 3)
    a[..., 1] = 0
    leaves = [t.requires_grad_() for t in (randn(1, T, D, dtype=dtype), a, randn(S, D, dtype=dtype))]
    transfer, added = diagonal_scan_summary(*leaves[:2], cu_seqlens=bounds_of(lengths))
    _, wanted = diagonal_scan(
        *leaves[:2], initial_state=leaves[2], cu_seqlens=bounds_of(lengths), backend="reference"
    )  # fmt: skip
    assert_makes_the_final_state(transfer * leaves[2] + added, wanted, leaves)


def summaries_of_rows(dtype, packed=False):
    """All summaries of 3 rows (B, T, …), or of the same rows as documents of one."""
    B, T = 3, 21
    x, dt, A, groups = randn(B, T, H, 2), randn(B, T, H), -randn(H).exp(), randn(B, T, 2, N)
    k, v, beta, g = randn(B, T, 2, H, K), randn(B, T, 2, H, V), randn(B, T, 2, H).sigmoid(), -randn(B, T, H).exp()
    tensors = [t.to(dtype) for t in (x, dt, groups, k, v, beta, g, randn(B, T, 5), randn(B, T, 5).sigmoid())]
    bounds = bounds_of([T] * B) if packed else None
    x, dt, groups, *delta, inputs, decays = (t.flatten(0, 1)[None] for t in tensors) if packed else tensors
    return [
        *ssd_summary(x, dt, A.to(dtype), groups, dt_softplus=True, cu_seqlens=bounds, chunk_size=8),
        *gated_delta_summary(*delta, qk_l2norm=True, cu_seqlens=bounds, chunk_size=8),
        *diagonal_scan_summary(inputs, decays, cu_seqlens=bounds),
    ]


def test_rows_are_sequences():
    rows = summaries_of_rows(torch.float64)
    shapes = [(3, H), (3, H, 2, N), (3, H, K, K), (3, H, K, V), (3, 5), (3, 5)]
    assert [t.shape for t in rows] == [torch.Size(s) for s in shapes]
    torch.manual_seed(0)
    torch.testing.assert_close(rows, summaries_of_rows(torch.float64, packed=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_summaries_of_bfloat16_are_float32(autocast):
    """Under autocast as well: a transfer rounded to bfloat16 would lose its orthogonality over a few shards."""
    exact = summaries_of_rows(torch.float64)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = summaries_of_rows(torch.float32)
    for g, want in zip(got, exact):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), want, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    assert {t.dtype for t in summaries_of_rows(torch.bfloat16)} == {torch.float32}
