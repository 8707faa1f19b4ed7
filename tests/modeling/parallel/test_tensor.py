"""Tensor parallelism: every mixer on two and four ranks gives the loss and the gradients of one process."""

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.parallel.mesh import ALONE, Axis
from riverrun.modeling.parallel.sharding import build_sharded, parameter_plan, shard_shapes
from riverrun.modeling.parallel.split import Split
from tests.modeling.parallel.sharded import BASE, BOUNDS, SHAPES, assert_parts_make_the_whole, of, part

every_shape = pytest.mark.parametrize("shape", SHAPES)


@every_shape
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_that_share_a_model_compute_as_one(ranks, shape, tp):
    assert_parts_make_the_whole(ranks(tp).run(part, shape, 1, tp, tp == 2, BOUNDS), shape, 1, tp, BOUNDS)


@every_shape
def test_shards_are_cut_from_the_same_weights(shape):
    config = RiverrunConfig.from_options(SHAPES[shape])
    torch.manual_seed(0)
    whole = build_sharded(config, ALONE)
    plan, shapes, shards = parameter_plan(whole, 4), shard_shapes(config, 4), []
    for rank in range(4):
        torch.manual_seed(0)
        shards.append(dict(build_sharded(config, Axis(4, rank, None)).named_parameters()))
    for name, param in whole.named_parameters():
        parts = [shard[name] for shard in shards]
        assert {p.shape for p in parts} == {shapes[name]}
        for p in parts:
            assert vars(p).items() >= vars(param).items()  # what optimiser and precision go by
        split = plan[name]
        assert torch.equal(parts[-1] if split is None else split.join(parts), param), name


def test_blocks_of_a_dimension_are_cut_each():
    full = torch.arange(12).view(1, 12)
    split = Split(1, blocks=2)
    shards = [split.take(full, Axis(3, rank)) for rank in range(3)]
    assert [s.tolist() for s in shards] == [[[0, 1, 6, 7]], [[2, 3, 8, 9]], [[4, 5, 10, 11]]]
    assert torch.equal(split.join(shards), full)


def test_everything_that_does_not_divide_is_listed():
    options = of("mamba2", "gated_delta", "attention", "para_gru", "lstm", vocab_size=41)
    found = "\n".join(options.tp_problems(16))
    for what in ("vocab_size=41", "intermediate_size=24", "mamba2", "gated_delta.num_heads", "attention.num_heads"):
        assert what in found
    for what in ("para_gru.num_heads", "lstm's heads"):
        assert what in found
    with pytest.raises(ValueError, match="cannot be shared"):
        shard_shapes(RiverrunConfig.from_options(BASE), 3)


def test_a_shared_model_gives_no_logits():
    model = build_sharded(RiverrunConfig.from_options(BASE), Axis(2, 0, None))
    with pytest.raises(ValueError, match="export it to generate"):
        model(torch.zeros(1, 4, dtype=torch.long))
