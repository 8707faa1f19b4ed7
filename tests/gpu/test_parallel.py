"""Ranks with a GPU each train as one GPU does, over NCCL: `torch.cuda.device_count()` says how many there can be."""

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.parallel.sharding import meta_model, parameter_plan
from tests.distributed import parity_workers
from tests.modeling.parallel.sharded import SHAPES
from tests.ranks import Group

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def groups():
    made = {world: Group(world, "nccl") for world in (1, 2)}
    yield made
    for group in made.values():
        group.stop()


def apart(losses, norms, weights, whole):
    """How far they are from another training's at most: losses and norms of gradients as a share, weights."""
    pairs = [(losses, whole[0]), (norms, whole[1])]
    shares = [max(abs(x / y - 1) for x, y in zip(*pair)) for pair in pairs]
    return *shares, max((weights[name] - weight).abs().max().item() for name, weight in whole[3].items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (1, 2), (2, 1)], ids=["dp2", "tp2", "cp2"])
@pytest.mark.parametrize("shape", ["hybrid", "para_gru"])
def test_two_gpus_train_as_one(groups, shape, cp, tp, stage, dtype):
    """To rounding in float32; in bf16, which moves weights by whole steps of the optimiser, they are about as far from
    float32 as one GPU is."""

    def alone(dtype, accumulation=1):
        return groups[1].run(parity_workers.train, shape, 1, 1, 1, accumulation, False, False, "cuda", dtype)[0]

    whole, bounds = alone("fp32"), [1e-4, 5e-4, 4e-5]
    if dtype == "bf16":
        rounded = [alone("bf16", accumulation) for accumulation in (1, 2, 4)]
        bounds = [3 * max(x) for x in zip(*(apart(*run[:2], run[3], whole) for run in rounded))]
    results = groups[2].run(parity_workers.train, shape, cp, tp, stage, 2, True, False, "cuda", dtype)
    plan = parameter_plan(meta_model(RiverrunConfig.from_options(SHAPES[shape])), tp)
    by_rank = sorted(results, key=lambda result: result[4])[:tp]
    weights = {}
    for name, split in plan.items():
        parts = [result[3][name] for result in by_rank]
        weights[name] = parts[0] if split is None else split.join(parts)
    for losses, norms, *_ in results:
        found = apart(losses, norms, weights, whole)
        print(f"{shape} cp{cp} tp{tp} ZeRO-{stage} {dtype}: {found}, of {bounds}")
        assert all(x <= bound for x, bound in zip(found, bounds)), (found, bounds)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_reduced_during_the_backward_pass(groups, stage):
    later, sooner = (
        groups[2].run(parity_workers.train, "hybrid", 1, 1, stage, 2, False, overlap, "cuda", "fp32")
        for overlap in (False, True)
    )
    for want, got in zip(later, sooner):
        assert got[0] == pytest.approx(want[0], rel=1e-6) and got[1] == pytest.approx(want[1], rel=1e-5)
