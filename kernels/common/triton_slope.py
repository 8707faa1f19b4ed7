"""How the last state of a short sequence depends on the one before its first token, in Triton.

One pass, token by token: the state, and the product of the steps' Jacobians. Autograd gives the same of the solvers
(`slope.py`), for a solve that keeps all states and one more for each state vector: on a GPU that is many launches for
few tokens.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, is_due, rounding, widest
from riverrun.kernels.common.shooting import final_state, statistics_of
from riverrun.kernels.common.slope import linearise
from riverrun.kernels.common.triton_affine import identity, multiply, select, zeros
from riverrun.kernels.common.triton_shooting import STEPS, TritonCell
from riverrun.kernels.common.triton_solve import load_group, load_rows, token_of
from riverrun.kernels.common.whole import ceil_div

BLOCK = 32  # channels of a program, one a thread


@triton.jit(do_not_specialize=["T"])
def slope_kernel(
    gates,  # (B, T, G, D)
    weight,  # (P, D)
    bias,  # (G, D)
    cu_seqlens,  # (S + 1,) if PACKED
    slope,  # (S, K, K, D) float32
    T,
    ACTIVATE: tl.constexpr,
    NEW_STATE: tl.constexpr,
    JACOBIAN: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
):
    blocks: tl.constexpr = (D + BD - 1) // BD
    s = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    channel = d < D
    begin = s * T
    length = T
    if PACKED:
        begin = tl.load(cu_seqlens + s).to(tl.int64)
        length = (tl.load(cu_seqlens + s + 1) - begin).to(tl.int32)
    w = load_rows(weight + d, channel, D, P)
    w_bias = load_rows(bias + d, channel & HAS_BIAS, D, G)
    nothing = tl.zeros([BD], tl.float32)
    state = zeros(nothing, K)
    A = identity(nothing, K)
    p = gates + begin * (G * D) + d
    following = load_group(p, tl.where(channel, length, 0), D, G, U, False)
    for i in range(0, length, U):
        group = following
        left = tl.where(channel, length - i, 0)
        following = load_group(p + (i + U) * (G * D), left - U, D, G, U, False)
        for j in tl.static_range(U):
            kept = ACTIVATE(state, token_of(group, w_bias, j, G), w)
            A = select(left > j, multiply(JACOBIAN(kept, w), A, K), A)
            state = select(left > j, NEW_STATE(kept), state)
    for k in tl.static_range(K * K):
        tl.store(slope + (s * (K * K) + k) * D + d, A[k], mask=channel)


def compute_slope(
    cell: TritonCell,
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    B, T, G, D = gates.shape
    S, K = B if cu_seqlens is None else len(cu_seqlens) - 1, cell.num_states
    slope = gates.new_empty(S, K, K, D, dtype=torch.float32)
    slope_kernel[(S * ceil_div(D, BLOCK),)](
        gates, weight, weight if bias is None else bias, slope if cu_seqlens is None else cu_seqlens, slope, T,
        ACTIVATE=cell.activate, NEW_STATE=cell.new_state, JACOBIAN=cell.jacobian, D=D, G=G, K=K, P=cell.num_weights,
        BD=BLOCK, U=STEPS, HAS_BIAS=bias is not None, PACKED=cu_seqlens is not None, num_warps=1,
    )  # fmt: skip
    return slope


def check(
    name: str,
    cell: TritonCell,
    chunked: Callable[..., torch.Tensor],
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed: bool,
) -> None:
    """The self-check of the kernel for such tensors, against the solver `chunked` (see `shooting.define_op`)."""
    (G, D), K, T = gates.shape[2:], cell.num_states, 2 * STEPS + 3

    def compare() -> float:
        draw, bounds = draws(gates.device), [0, 1, STEPS + 2, T]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=gates.device) if packed else None
        u, w = draw(1, T, G, D).to(gates.dtype), (draw(cell.num_weights, D) / 4).to(weight.dtype)
        offset = None if bias is None else draw(G, D).to(bias.dtype)
        whole = widest(u) if offset is None else widest(u) + widest(offset)

        def end(start: torch.Tensor) -> torch.Tensor:
            statistics_of(name).sequential -= 1  # which is no solve of the user's
            return final_state(chunked(whole, widest(w), start, cu_seqlens, T, 1e-5, 0), cu_seqlens)

        _, want = linearise(end, whole.new_zeros(len(bounds) - 1 if packed else 1, K, D))
        return deviation([compute_slope(cell, u, w, offset, cu_seqlens)], [want])

    sizes: dict[str, object] = {"D": D, "bias": bias is not None, "packed": packed}
    sizes |= {"dtype": gates.dtype, "parameters": weight.dtype}
    check_once(f"{name}_slope", sizes, gates.device, compare, rounding(gates.dtype))


def define_triton_slope(
    name: str, cell: TritonCell, chunked: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Register a torch operator without a gradient that is checked at first use against the solver in torch.

    `(gates (B, T, G, D), weight (P, D), bias (G, D), cu_seqlens) → ∂(final state)/∂(initial state) (S, K, K, D)` at an
    initial state of zeros, in float32; bias and cu_seqlens may be None.
    """

    @operator(f"{name}_slope_triton")
    def slope(
        gates: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        if is_due(gates):
            check(name, cell, chunked, gates, weight, bias, cu_seqlens is not None)
        return compute_slope(cell, gates, weight, bias, cu_seqlens)

    @slope.register_fake
    def _(gates, weight, bias, cu_seqlens):
        S, K = gates.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, cell.num_states
        return gates.new_empty(S, K, K, gates.shape[3], dtype=torch.float32)

    def call(
        gates: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        return slope(*(x if x is None else x.detach().contiguous() for x in (gates, weight, bias, cu_seqlens)))

    return call
