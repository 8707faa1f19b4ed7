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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (1, 2), (2, 1)], ids=["dp2", "tp2", "cp2"])
@pytest.mark.parametrize("shape", ["hybrid", "para_gru"])
def test_two_gpus_train_as_one(groups, shape, cp, tp, stage, dtype):
    (whole,) = groups[1].run(parity_workers.train, shape, 1, 1, 1, 1, False, False, "cuda", dtype)
    results = groups[2].run(parity_workers.train, shape, cp, tp, stage, 2, True, False, "cuda", dtype)
    rounding = {"fp32": 1e-4, "bf16": 3e-2}[dtype]
    for got in results:
        assert got[0] == pytest.approx(whole[0], rel=rounding)
        assert got[1] == pytest.approx(whole[1], rel=5 * rounding)
    plan = parameter_plan(meta_model(RiverrunConfig.from_options(SHAPES[shape])), tp)
    for name, weight in whole[3].items():
        split, parts = plan[name], [got[3][name] for got in sorted(results, key=lambda r: r[4])[:tp]]
        got = parts[0] if split is None else split.join(parts)
        assert (got - weight).abs().max() < 20 * rounding * 2e-2 + rounding * weight.abs().max(), name


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_reduced_during_the_backward_pass(groups, stage):
    later, sooner = (
        groups[2].run(parity_workers.train, "hybrid", 1, 1, stage, 2, False, overlap, "cuda", "fp32")
        for overlap in (False, True)
    )
    for want, got in zip(later, sooner):
        assert got[0] == pytest.approx(want[0], rel=1e-6) and got[1] == pytest.approx(want[1], rel=1e-5)
