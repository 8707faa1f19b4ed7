"""What lies between the matrix products of `linear_cross_entropy`, each in one pass over a chunk's logits."""

import torch
import triton
import triton.language as tl

from riverrun.kernels.common.operator import operator
from riverrun.kernels.common.self_check import check_once, deviation, draws, is_due, rounding
from riverrun.kernels.common.triton_math import exp
from riverrun.kernels.common.whole import ceil_div

BLOCK, WARPS = 4096, 8


@triton.jit
def log_z_kernel(logits, targets, log_z, picked, V, BLOCK: tl.constexpr):
    """One row a program: log Σ e^x, with the largest x so far taken out, and the target's logit."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=float("-inf"))
        new = tl.maximum(top, tl.max(x, 0))
        total = total * exp(top - new) + tl.sum(exp(x - new), 0)
        top = new
    tl.store(log_z + row, top + tl.log(total))
    tl.store(picked + row, tl.load(logits + tl.load(targets + row)))


@triton.jit
def gradient_kernel(logits, targets, log_z, of_softmax, of_target, gradient, V, BLOCK: tl.constexpr):
    """of_softmax · softmax(x) − of_target at the target."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + column, mask=column < V, other=0.0)
    grad = exp(x - tl.load(log_z + row)) * tl.load(of_softmax + row)
    grad -= tl.where(column == tl.load(targets + row), tl.load(of_target + row), 0.0)
    tl.store(gradient + row * V + column, grad.to(gradient.dtype.element_ty), mask=column < V)


def log_partition(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (N, V) float32, targets (N,) → log Σ e^x (N,) and the logits at the targets (N,)."""
    N, V = logits.shape
    out, picked = logits.new_empty(2, N).unbind()
    log_z_kernel[(N,)](logits, targets, out, picked, V, BLOCK=BLOCK, num_warps=WARPS)
    return out.clone(), picked.clone()


def gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_z: torch.Tensor,
    of_softmax: torch.Tensor,
    of_target: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of the logits (N, V), in `dtype`, from those of −log softmax's two parts, (N,) each."""
    N, V = logits.shape
    out = logits.new_empty(N, V, dtype=dtype)
    gradient_kernel[(N, ceil_div(V, BLOCK))](
        logits, targets, log_z, of_softmax, of_target, out, V, BLOCK=BLOCK, num_warps=WARPS
    )
    return out


def check(logits: torch.Tensor, dtype: torch.dtype | None) -> None:
    """The self-check of the gradient's kernel for logits like these, or of the other where no `dtype` is given."""
    aligned, device = logits.shape[1] % 16 == 0, logits.device  # which is what compilers look at

    def compare() -> float:
        draw = draws(device)
        N, V = 5, 2 * BLOCK + (16 if aligned else 7)
        x, upstream, picked_upstream = 4 * draw(N, V), draw(N), draw(N)
        targets = torch.arange(N, device=device) * (V // N)
        wide = x.double()
        log_z = wide.logsumexp(1)
        if dtype is None:
            return deviation(log_partition(x, targets), (log_z, wide[range(N), targets]))
        got = gradient(x, targets, log_z.float(), upstream, picked_upstream, dtype)
        want = wide.softmax(1) * upstream[:, None]
        want[range(N), targets] -= picked_upstream
        return deviation([got], [want])

    sizes: dict[str, object] = {
        "kernel": "log_z" if dtype is None else "gradient",
        "aligned": aligned,
        "dtype": dtype or logits.dtype,
    }
    limit = rounding(dtype or logits.dtype)
    check_once("linear_cross_entropy", sizes, device, compare, limit)


@operator("log_z")
def log_z(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_partition`, checked at first use."""
    if is_due(logits):
        check(logits, None)
    return log_partition(logits, targets)


@log_z.register_fake
def _(logits, targets):
    return logits.new_empty(len(logits)), logits.new_empty(len(logits))


@operator("softmax_gradient")
def softmax_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_z: torch.Tensor,
    of_softmax: torch.Tensor,
    of_target: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`gradient`, checked at first use."""
    if is_due(logits):
        check(logits, dtype)
    return gradient(logits, targets, log_z, of_softmax, of_target, dtype)


@softmax_gradient.register_fake
def _(logits, targets, log_z, of_softmax, of_target, dtype):
    return torch.empty_like(logits, dtype=dtype)
