"""Linear recurrences over shards of rows: between ranks goes what a shard does to the state that enters it.

A shard turns the state S that enters it into M S + E. Every rank gathers all M and E, once each way, and folds those
of the ranks before it: as in LASP-2 (arXiv 2502.07563), for any affine recurrence and packed documents. The other way,
`method="heads"`, see `modeling.parallel.heads`.
"""

from functools import partial

import torch

from riverrun.kernels.diagonal_scan import diagonal_scan, diagonal_scan_summary
from riverrun.kernels.gated_delta import gated_delta, gated_delta_backend, gated_delta_summary
from riverrun.kernels.ssd import ssd, ssd_backend, ssd_summary
from riverrun.modeling.parallel.carried import carried
from riverrun.modeling.parallel.collectives import all_gather
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.heads import from_heads, shares_heads, to_heads


def context_ssd(
    context: Context,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = True,
    chunk_size: int,
) -> torch.Tensor:
    """`ssd` of rows that several ranks share: this rank's y. x (B, T, H, P), or
    (1, B·T, H, P) if documents begin inside rows, and so the others."""
    (H, P), (G, N) = x.shape[2:], B.shape[2:]
    op = partial(ssd, dt_softplus=dt_softplus, chunk_size=chunk_size)
    if not context.connected:
        return op(x, dt, A, B, C, D, dt_bias=dt_bias, cu_seqlens=context.cu_seqlens)[0]
    size = context.axis.size
    sent = G if G % size == 0 else G * size  # ranks that share a group get all groups
    moved = (2 * H * P + H + 2 * sent * N) * x.element_size()
    cheaper = shares_heads(H, moved, 4 * H * (P * N + 1), context) and _groups_fit(G, size)
    if context.takes_heads(H, cheaper):
        mine = context.axis.share(H)
        B, C = (_groups(t, context) for t in (B, C))
        x, dt = to_heads(x, context, 2), to_heads(dt, context, 2)
        D, dt_bias = (t if t is None else t[mine] for t in (D, dt_bias))
        y, _ = op(x, dt, A[mine], B, C, D, dt_bias=dt_bias, cu_seqlens=context.row_bounds)
        return from_heads(y, context, 2)
    if ssd_backend(x, N) == "triton":
        from riverrun.kernels.ssd.triton_carried import CarriedSSD
        from riverrun.kernels.ssd.triton_op import as_kernels_take

        u, raw, a, b, c, d, bias = as_kernels_take(x, dt, A, B, C, D, dt_bias)
        return carried(context, CarriedSSD(dt_softplus), u, raw, b, c, a, d, bias, tokens=4)
    decay, added = ssd_summary(
        context.tail(x), context.tail(dt), A, context.tail(B), dt_bias=dt_bias, dt_softplus=dt_softplus,
        cu_seqlens=context.tail_seqlens, chunk_size=chunk_size,
    )  # fmt: skip
    initial = context.initial(context.incoming(added, decay[..., None, None] if context.chain else None))
    return op(x, dt, A, B, C, D, dt_bias=dt_bias, initial_state=initial, cu_seqlens=context.cu_seqlens)[0]


def _groups_fit(G: int, size: int) -> bool:
    """Whether each rank's share of the heads is whole groups, or lies within one."""
    return G % size == 0 or size % G == 0


def _groups(x: torch.Tensor, context: Context) -> torch.Tensor:
    """B or C (…, G, N) of the whole rows: the groups of this rank's heads."""
    G, size = x.shape[2], context.axis.size
    if not _groups_fit(G, size):
        raise ValueError(
            f"parallel.linear='heads' cannot share {G} groups of heads among parallel.cp={size} ranks, neither whole "
            "groups a rank nor whole ranks a group: use parallel.linear='states'"
        )
    if G % size == 0:
        return to_heads(x, context, 2)
    rows = all_gather(x.view(*context.shape, *x.shape[2:]), context.axis, dim=1)
    group = context.axis.rank * G // size
    rows = rows[:, :, group : group + 1]
    return rows if context.row_bounds is None else rows.flatten(0, 1)[None]


def context_gated_delta(
    context: Context,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    *,
    beta_max: float,
    chunk_size: int,
) -> torch.Tensor:
    """`gated_delta` with keys and queries of unit length, of rows that several ranks share: this rank's o. q
    (B, T, H, K), or (1, B·T, H, K) if documents begin inside rows, and so the others."""
    (H, K), V, n = q.shape[2:], v.shape[-1], k.shape[2]
    op = partial(gated_delta, qk_l2norm=True, beta_max=beta_max, chunk_size=chunk_size)
    if not context.connected:
        return op(q, k, v, beta, g, cu_seqlens=context.cu_seqlens)[0]
    moved = H * (K + n * (K + V + 2) + V + 2) * q.element_size()
    summary = 4 * H * K * (V + K * (context.chain > 0))
    if context.takes_heads(H, shares_heads(H, moved, summary, context)):
        q, k, v, beta = (to_heads(t, context, dim) for t, dim in ((q, 2), (k, 3), (v, 3), (beta, 3)))
        g = None if g is None else to_heads(g, context, 2)
        return from_heads(op(q, k, v, beta, g, cu_seqlens=context.row_bounds)[0], context, 2)
    if gated_delta_backend(q, n, V) == "triton":
        from riverrun.kernels.gated_delta.triton_carried import CarriedGatedDelta
        from riverrun.kernels.gated_delta.triton_op import as_kernels_take

        inputs = as_kernels_take(q, k, v, beta, g)
        return carried(context, CarriedGatedDelta(K**-0.5, beta_max > 1), *inputs, tokens=5)
    transfer, added = gated_delta_summary(
        context.tail(k), context.tail(v), context.tail(beta), None if g is None else context.tail(g), qk_l2norm=True,
        cu_seqlens=context.tail_seqlens, with_transfer=context.chain > 0, chunk_size=chunk_size,
    )  # fmt: skip
    initial = context.initial(context.incoming(added, transfer, _matmul))
    return op(q, k, v, beta, g, initial_state=initial, cu_seqlens=context.cu_seqlens)[0]


def _matmul(transfer: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """In the precision of states, under autocast too."""
    with torch.autocast(state.device.type, enabled=False):
        return transfer @ state


def context_diagonal_scan(context: Context, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """`diagonal_scan` of rows that several ranks share: this rank's h. x (B, T, D), or (1, B·T, D) if documents begin
    inside rows, and so a, or a (D,).

    It has no heads to move, and never should: its summary is as small as two tokens.
    """
    if not context.connected:
        return diagonal_scan(x, a, cu_seqlens=context.cu_seqlens)[0]
    product, added = diagonal_scan_summary(
        context.tail(x), a if a.dim() == 1 else context.tail(a), cu_seqlens=context.tail_seqlens
    )  # fmt: skip
    if x.is_complex():  # NCCL knows no complex numbers
        pairs = context.incoming(torch.view_as_real(added), torch.view_as_real(product), _multiply_pairs)
        incoming = torch.view_as_complex(pairs)
    else:
        incoming = context.incoming(added, product)
    return diagonal_scan(x, a, initial_state=context.initial(incoming), cu_seqlens=context.cu_seqlens)[0]


def _multiply_pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of complex numbers as pairs (…, 2)."""
    return torch.view_as_real(torch.view_as_complex(a) * torch.view_as_complex(b))
