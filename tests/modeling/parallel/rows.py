"""One op on rows that several ranks share, against the same on one process on the whole rows and all documents."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from riverrun.modeling.parallel.context import Context
from tests.ranks import mesh

ROWS, LENGTH = 2, 16


@dataclass(frozen=True)
class Case:
    """An op and its arguments.

    Attributes:
        tokens: makes the arguments that have a value a token, (ROWS, LENGTH, …).
        params: makes those that all tokens share.
        whole: (cu_seqlens, *tokens, *params) → the output of packed rows, (1, ROWS · LENGTH, …).
        shared: (context, *tokens, *params) → the output of this rank's shards.
    """

    tokens: Callable[[], list[torch.Tensor]]
    params: Callable[[], list[torch.Tensor]]
    whole: Callable[..., torch.Tensor]
    shared: Callable[..., torch.Tensor]


def arguments(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(5)
    made = case.tokens(), case.params()
    # complex numbers stay what they are
    return tuple([t if t.is_complex() else t.to(dtype) for t in tensors] for tensors in made)


def weights(like: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss by the output (ROWS, LENGTH, …)."""
    generator = torch.Generator().manual_seed(9)
    shape = (ROWS, LENGTH, *like.shape[2:])
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.dtype)


def part(
    case: Case,
    bounds: list[int],
    cp: int,
    linear: str = "auto",
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
):
    """On a rank: its output (ROWS, T, …) and the gradients of its tokens, likewise, and of the shared arguments."""
    axis = mesh(cp=cp).cp
    context = Context.of_rows(axis, ROWS, LENGTH, bounds, "cpu", linear)
    tokens, params = arguments(case, dtype)
    tokens = [t[:, axis.share(LENGTH)].contiguous() for t in tokens]
    if context.cu_seqlens is not None:
        tokens = [t.flatten(0, 1)[None] for t in tokens]
    leaves = [t.requires_grad_() for t in (*tokens, *params)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = case.shared(context, *leaves)
    y.backward(weights(y)[:, axis.share(LENGTH)].reshape(y.shape))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(case.shared(context, *leaves), y.detach())
    rows = [t.view(ROWS, LENGTH // cp, *t.shape[2:]) for t in (y.detach(), *(t.grad for t in tokens))]
    return rows, [p.grad for p in params]


def assert_parts_make_the_whole(
    parts, case: Case, bounds: list[int], dtype: torch.dtype = torch.float64, rtol: float = 1e-10
) -> None:
    tokens, params = arguments(case, dtype)
    leaves = [t.requires_grad_() for t in (*(t.flatten(0, 1)[None] for t in tokens), *params)]
    y = case.whole(torch.tensor(bounds, dtype=torch.int32), *leaves)
    y.backward(weights(y).reshape(y.shape))
    got = [torch.cat(shards, dim=1) for shards in zip(*(rows for rows, _ in parts))]
    got += [sum(grads) for grads in zip(*(grads for _, grads in parts))]
    for i, (g, want) in enumerate(zip(got, (y.detach(), *(t.grad for t in leaves)), strict=True)):
        scale = want.abs().max().item()
        error = (g.view(want.shape) - want).abs().max().item()
        assert error <= rtol * scale + 1e-14, f"{'output' if i == 0 else f'gradient {i - 1}'}: {error} of {scale}"
