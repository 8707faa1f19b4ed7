"""What neural memories tell of themselves in training."""

from dataclasses import replace

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.memory_statistics import noting
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.statistics import take_noted
from tests.modeling.test_model import SHAPES, tokens


def statistics(shape, ids, train=True, change=None, **options):
    torch.manual_seed(0)
    options = replace(SHAPES["titans_lmm"].titans_lmm, **options)
    options = replace(SHAPES["titans_lmm"], titans_lmm=options, initializer_range=0.02)
    model = RiverrunForCausalLM(RiverrunConfig.from_options(options if shape is None else SHAPES[shape])).train(train)
    if change is not None:
        change(model)
    take_noted()
    model(ids, labels=ids)
    return {name: total / count for name, (total, count) in take_noted().items()}


def test_only_memories_in_training_tell():
    assert statistics("mamba2", tokens(2, 9)) == {}
    assert statistics(None, tokens(2, 9), train=False) == {}
    names = {"loss", "loss_before", "norm", "update", "alpha", "theta", "eta", "fast"}
    assert set(statistics(None, tokens(2, 9))) == {f"memory_{name}" for name in names}
    assert take_noted() == {}


def test_memories_are_silent_where_nobody_asks():
    with noting(False):
        assert statistics(None, tokens(2, 9)) == {}
        with noting(True):
            assert statistics(None, tokens(2, 9))
        assert statistics(None, tokens(2, 9)) == {}
    assert statistics(None, tokens(2, 9))


def test_a_memory_that_steps_learns_what_it_saw():
    found = statistics(None, tokens(2, 64), depth=1, chunk_size=1, half_life=1e6)
    assert found["memory_loss"] < 0.9 * found["memory_loss_before"]
    assert found["memory_update"] > 0.1 and found["memory_fast"] == 0


def test_gates_are_those_of_the_first_step():
    def still(model):
        for block in model.model.layers:
            for name in ("alpha", "theta", "eta"):
                torch.nn.init.zeros_(getattr(block.mixer.memory, f"{name}_proj").weight)

    found = statistics(None, tokens(2, 9), change=still, half_life=2.0, momentum_init=0.75, chunk_size=4)
    assert found["memory_alpha"] == pytest.approx(1 - 2**-0.5, rel=1e-5) and found["memory_fast"] == 1
    assert found["memory_eta"] == pytest.approx(0.75, rel=1e-5)
    # half of the cap, 2 (1 − η) / (b κ); of two layers and a norm of ε = 0.01; ¼ is the activation's squared slope
    options = SHAPES["titans_lmm"].titans_lmm
    K, expand = options.head_dim, options.expand
    curvature = expand / (4 * K * 0.01) + (1 + expand**-0.5) ** 2 / (4 * K * (1 / (4 * K) + 0.01))
    assert found["memory_theta"] == pytest.approx(0.5 * 2 * 0.25 / (4 * curvature), rel=1e-5)


def test_steps_of_none_change_nothing():
    def stop(model):
        for block in model.model.layers:
            block.mixer.memory.theta_bias.data.fill_(-1e4)

    found = statistics(None, tokens(2, 9), change=stop, half_life=1e12, num_persistent=0)
    assert found["memory_update"] < 1e-6 and found["memory_norm"] == pytest.approx(1, abs=1e-6)
    assert found["memory_loss"] == pytest.approx(found["memory_loss_before"], rel=1e-4)


def test_tokens_of_other_documents_are_not_counted():
    """A row's last document alone, beside others."""
    torch.manual_seed(0)
    model = RiverrunForCausalLM(RiverrunConfig.from_options(SHAPES["titans_lmm"])).train()
    ids = tokens(1, 20)
    losses = []
    for part, bounds in ((ids, [0, 7, 20]), (ids[:, 7:], [0, 13])):
        take_noted()
        model(part, labels=part, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        total, count = take_noted()["memory_loss"]
        losses.append(total / count)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
