"""The drill against flipped bits, on gloo ranks: which rank, which parameter; and what must not be noticed."""

import pytest
import torch
from torch import nn

from riverrun.modeling.parallel.mesh import Axis, Mesh
from riverrun.train.replicas import Replicas, checksums, describe
from tests.ranks import mesh

INTS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.first = nn.Linear(7, 5, dtype=dtype)
        self.second = nn.Linear(5, 3, dtype=dtype)
        self.norm = nn.Parameter(torch.zeros(3))  # of another type, as the parameters that stay in fp32


def flip(param: torch.Tensor, index: int, bit: int) -> None:
    bits = param.detach().view(-1).view(INTS[param.dtype])
    one = torch.tensor([1], dtype=bits.dtype) << bit
    bits[index] ^= one[0]


def checked(rank_to_flip, name, index, bit, repeat=1):
    """Every rank's answer after one bit of one parameter was flipped on one rank."""
    import torch.distributed as dist

    torch.manual_seed(0)
    model = Model()
    replicas = Replicas(model, mesh(), zero_stage=1)
    before = replicas.check()
    if dist.get_rank() == rank_to_flip:
        flip(model.get_parameter(name), index, bit)
    return before, *[replicas.check() for _ in range(repeat)]


@pytest.mark.parametrize(
    ("rank", "name", "index", "bit"),
    [(0, "first.weight", 0, 0), (1, "second.bias", 2, 15), (2, "norm", 1, 31), (2, "first.weight", 34, 7)],
)
def test_a_flipped_bit_and_its_rank(ranks, rank, name, index, bit):
    answers = ranks(3).run(checked, rank, name, index, bit)
    assert len(set(answers)) == 1, "every rank is told the same"
    before, after = answers[0]
    assert before is None
    assert f"rank {rank} on " in after and f" has another {name}" in after and after.count("rank ") == 1


def test_of_two_ranks_either_may_be_wrong(ranks):
    for _, after in ranks(2).run(checked, 1, "norm", 0, 31):  # -0.0 instead of 0.0, which compare as equal
        assert "one of rank 0 on" in after and ", rank 1 on" in after and "has a wrong norm" in after


def payloads(value):
    import torch.distributed as dist

    model = Model(torch.float32)
    for param in model.parameters():
        param.data.fill_(0.5)
    model.first.weight.data.fill_(float("nan"))
    replicas = Replicas(model, mesh(), zero_stage=2)
    equal = replicas.check()
    if dist.get_rank() == 1:
        model.first.weight.data.view(torch.int32)[0, 0] = value
    return equal, replicas.check()


def test_nans_are_equal_to_themselves_and_not_to_others(ranks):
    for equal, other in ranks(3).run(payloads, 0x7FC00001):
        assert equal is None
        assert "rank 1 on" in other and "first.weight" in other


def on_tp():
    """dp 2 × tp 2: `first` is cut, and differs between the two of tp by right."""
    import torch.distributed as dist

    place = mesh(tp=2)
    torch.manual_seed(place.tp.rank)
    model = Model()
    for param in (model.second.weight, model.second.bias, model.norm):
        param.data.fill_(0.25)
    for param in model.first.parameters():
        param.tensor_model_parallel = True
    replicas = Replicas(model, place, zero_stage=1)
    answers = [replicas.check()]
    if dist.get_rank() == 3:
        flip(model.first.bias, 1, 3)
    answers.append(replicas.check())
    if dist.get_rank() == 3:
        flip(model.first.bias, 1, 3)
        flip(model.second.bias, 1, 3)
    answers.append(replicas.check())
    return answers


def test_what_tensor_parallelism_cuts_is_compared_over_dp_and_the_rest_over_all(ranks):
    for fine, cut, whole in ranks(4).run(on_tp):
        assert fine is None
        assert "one of rank 1 on" in cut and ", rank 3 on" in cut and "first.bias" in cut and "rank 0" not in cut
        assert "rank 3 on" in whole and "has another second.bias" in whole and whole.count("rank ") == 1


def checksum(values: torch.Tensor) -> int:
    return int(checksums([values])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_every_bit_counts(dtype):
    values = torch.randn(50).to(dtype)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    sums = {checksum(values)}
    for index in range(50):
        for bit in range(8 * values.element_size()):
            other = values.clone()
            bits = other.view(integers)
            bits[index] ^= torch.tensor(1, dtype=integers) << bit
            sums.add(checksum(other))
    assert len(sums) == 1 + 50 * 8 * values.element_size()


def test_large_parameters_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr("riverrun.train.replicas.PIECE", 16)
    values = torch.randn(5, 13)
    sums = {checksum(values)}
    for index in (0, 15, 16, 33, 64):
        other = values.clone()
        flip(other, index, 0)
        sums.add(checksum(other))
    swapped = values.clone()
    swapped[0], swapped[4] = values[4], values[0]
    sums.add(checksum(swapped))
    assert len(sums) == 7
    assert checksum(values.t()) != checksum(values), "the order counts"


def test_stage_3_has_no_copies():
    with pytest.raises(ValueError, match=r"set engine.zero_stage to 1 or 2"):
        Replicas(Model(), Mesh(), zero_stage=3)


def test_alone_there_is_nothing_to_compare():
    assert Replicas(Model(), Mesh(), zero_stage=1).check() is None


def test_several_ranks_and_many_parameters_in_words():
    names, hosts = [f"p{i}" for i in range(6)], [f"n{rank // 2}" for rank in range(5)]
    sums = [[0] * 6 for _ in range(5)]
    sums[3] = [1] * 6
    sums[4][5] = 2
    said = describe(names, [False] * 6, sums, [range(5)], hosts)
    assert "rank 3 on n1 has another p0, p1, p2 and 2 more" in said
    assert "rank 3 on n1, rank 4 on n2 have another p5" in said
    torn = describe(["p"], [False], [[0], [0], [1], [1]], [range(4)], hosts)
    assert "of rank 0 on n0, rank 1 on n0, rank 2 on n1, rank 3 on n1 no majority agrees on p" in torn


def after_training_steps(layout, stage):
    """The real engine: its copies stay equal, and one that is changed is found."""
    import torch.distributed as dist

    from riverrun.modeling.config import RiverrunConfig
    from riverrun.modeling.mixer_options import AttentionOptions, Mamba2Options
    from riverrun.modeling.options import ModelOptions
    from riverrun.modeling.parallel.sharding import build_sharded
    from riverrun.train.config import EngineConfig, OptimizerConfig, TrainConfig
    from riverrun.train.data.packing import Batch
    from riverrun.train.distributed import Ranks
    from riverrun.train.engine import Engine

    place = mesh(**layout)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), place)
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, layer_pattern=("mamba2", "attention"),
        attention=AttentionOptions(head_dim=8), mamba2=Mamba2Options(head_dim=8, chunk_size=4),
    ).resolve()  # fmt: skip
    model = build_sharded(RiverrunConfig.from_options(options), place.tp)
    engine = Engine(model, OptimizerConfig(), TrainConfig(micro_batch_size=1), EngineConfig(zero_stage=stage), ranks, 1)
    replicas = Replicas(engine.module, place, stage)
    answers = [replicas.check()]
    generator = torch.Generator().manual_seed(dist.get_rank() // place.tp.size)
    for _ in range(3):
        rows = torch.randint(32, (1, 9), generator=generator)
        engine.accumulate([Batch(rows[:, :-1], rows[:, 1:], torch.tensor([0, 8], dtype=torch.int32), 8)])
        assert not engine.step(1.0).skipped
        answers.append(replicas.check())
    if dist.get_rank() == 1:
        flip(dict(engine.module.named_parameters())["model.norm.weight"], 3, 0)
    answers.append(replicas.check())
    return answers


@pytest.mark.parametrize(("layout", "stage"), [({}, 1), ({}, 2), ({"tp": 2}, 1)])
def test_an_engine_keeps_its_copies_equal(ranks, layout, stage):
    for *before, after in ranks(4 if layout else 3).run(after_training_steps, layout, stage):
        assert before == [None] * 4
        assert "rank 1 on" in after and "has another model.norm.weight" in after


def test_the_axis_of_the_mesh_that_is_innermost():
    """The drill takes rank % tp for a rank's place along tp."""
    replicas = Replicas(Model(), Mesh(tp=Axis(2, 0)), 1)
    assert replicas._columns(6) == [[0, 2, 4], [1, 3, 5]]
