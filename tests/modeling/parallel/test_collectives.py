"""Every collective against its definition on one process, and its backward pass against the definition's."""

import pytest
import torch

from riverrun.modeling.parallel import collectives
from riverrun.modeling.parallel.mesh import Mesh
from tests.ranks import mesh

WORLD = 4


def collect(name, shape, options):
    """One collective on this rank's tensor, and the gradient of a loss that is another on every rank."""
    axis = mesh(cp=WORLD).cp
    x = tensor(axis.rank, shape).requires_grad_()
    y = getattr(collectives, name)(x, axis, **options)
    (y * tensor(10 + axis.rank, y.shape)).sum().backward()
    return y.detach(), x.grad


def tensor(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(name, xs, options):
    match name:
        case "all_gather":
            return [torch.cat(xs, options["dim"])] * WORLD
        case "reduce_scatter":
            return list(sum(xs).chunk(WORLD, options["dim"]))
        case "all_reduce":
            return [sum(xs)] * WORLD
        case "all_to_all":
            parts = [x.chunk(WORLD, options["split"]) for x in xs]
            return [torch.cat([p[r] for p in parts], options["join"]) for r in range(WORLD)]
        case "shift":
            return [torch.zeros_like(xs[0]), *xs[:-1]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("all_gather", {"dim": 0}),
        ("all_gather", {"dim": 2}),
        ("reduce_scatter", {"dim": 0}),
        ("reduce_scatter", {"dim": 1}),
        ("all_reduce", {}),
        ("all_to_all", {"split": 1, "join": 2}),
        ("all_to_all", {"split": 2, "join": 0}),
        ("shift", {}),
    ],
)
def test_collectives(ranks, name, options):
    shape = (4, 8, 12)
    results = ranks(WORLD).run(collect, name, shape, options)
    xs = [tensor(rank, shape).requires_grad_() for rank in range(WORLD)]
    ys = expected(name, xs, options)
    sum((y * tensor(10 + rank, y.shape)).sum() for rank, y in enumerate(ys)).backward()
    for (y, grad), want, x in zip(results, ys, xs):
        torch.testing.assert_close(y, want.detach())
        torch.testing.assert_close(grad, torch.zeros_like(x) if x.grad is None else x.grad)


def axes(tp, cp):
    mesh = Mesh.of("cpu", torch.distributed.get_world_size(), cp=cp, tp=tp)
    return [(a.size, a.rank) for a in (mesh.dp, mesh.cp, mesh.tp, mesh.dpcp)]


def test_tensor_parallel_ranks_are_neighbours(ranks):
    """dp outermost, tp innermost: a node's fast links carry the most traffic."""
    assert ranks(WORLD).run(axes, 2, 1) == [
        [(2, 0), (1, 0), (2, 0), (2, 0)],
        [(2, 0), (1, 0), (2, 1), (2, 0)],
        [(2, 1), (1, 0), (2, 0), (2, 1)],
        [(2, 1), (1, 0), (2, 1), (2, 1)],
    ]
    assert ranks(WORLD).run(axes, 1, 2)[2] == [(2, 1), (2, 0), (1, 0), (4, 2)]


def test_ranks_that_do_not_divide():
    with pytest.raises(ValueError, match=r"start a multiple of 4 ranks"):
        Mesh.of("cpu", 6, cp=2, tp=2)
