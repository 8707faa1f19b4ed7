"""What a recurrence tells of itself in training, by hand."""

from dataclasses import replace

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.depth.statistics import note_iterates
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.statistics import note, take_noted

OPTIONS = ModelOptions(
    vocab_size=40, hidden_size=32, num_hidden_layers=3, layer_pattern=("attention",), sandwich_norm=True,
    depth=DepthOptions(prelude_layers=1, coda_layers=1, mean_recurrence=4, backprop_depth=2),
)  # fmt: skip


def means():
    return {name: value / count for name, (value, count) in take_noted().items()}


@pytest.fixture(autouse=True)
def empty():
    take_noted()


def test_change_and_norm_are_means_over_tokens():
    after = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]])
    note_iterates(after - torch.tensor([[[0.0, 2.5], [1.0, 0.0]]]), after, rows=False)
    found = means()
    assert found["depth_change"] == pytest.approx((0.5 + 0.1) / 2)
    assert found["depth_norm"] == pytest.approx((5 + 10) / 2 / 2**0.5)
    assert "depth_correlation" not in found and take_noted() == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_correlation_is_the_mean_cosine_of_pairs(dtype):
    s = torch.randn(2, 6, 16).to(dtype)
    note_iterates(s, s, rows=True)
    unit = torch.nn.functional.normalize(s.double(), dim=-1)
    cosines = unit @ unit.mT
    of_pairs = cosines[:, ~torch.eye(6, dtype=torch.bool)].mean()
    assert means()["depth_correlation"] == pytest.approx(of_pairs.item(), abs=1e-6)
    alike = torch.randn(1, 1, 16).expand(1, 6, 16) * torch.arange(1.0, 7.0)[:, None]
    note_iterates(alike, alike, rows=True)
    assert means()["depth_correlation"] == pytest.approx(1, abs=1e-5)


def test_calls_add_up():
    for value in (1.0, 2.0):
        note("depth_norm", torch.tensor(value), 3)
    assert take_noted() == {"depth_norm": [3.0, 6.0]}


def model(train=True, **changes):
    torch.manual_seed(0)
    made = RiverrunForCausalLM(RiverrunConfig.from_options(replace(OPTIONS, **changes)))
    return made.train(train)


@pytest.mark.parametrize("steps", [(0, 1), (3, 2), (4, 0)])
def test_a_model_notes_its_last_iteration(steps):
    made, ids = model(), torch.arange(18).view(2, 9)
    n, k = steps
    states = []
    advance = made.model.core.advance
    made.model.core.advance = lambda s, *rest: states.append((s, advance(s, *rest))) or states[-1][1]
    made(ids, labels=ids, num_steps=steps)
    found = means()
    before, after = states[-1]
    assert len(states) == n + k
    assert found["depth_change"] == pytest.approx(((after - before).norm(dim=-1) / after.norm(dim=-1)).mean().item())
    assert found["depth_norm"] == pytest.approx(after.norm(dim=-1).mean().item() / 32**0.5)


def test_only_recurrences_in_training_tell():
    ids = torch.arange(9)[None]
    model(train=False)(ids, labels=ids)
    model(depth=None)(ids, labels=ids)
    assert take_noted() == {}


def test_iterations_that_repel_are_seen():
    """A state that grows without bound, and one that stands still."""
    made, ids = model(sandwich_norm=False), torch.arange(18).view(2, 9)
    weight = made.model.core.injection.weight
    torch.nn.init.zeros_(weight)
    weight.data[:, :32].fill_diagonal_(2.0)
    for block in made.model.core.layers:
        torch.nn.init.zeros_(block.mixer.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    made(ids, labels=ids, num_steps=(6, 2))
    found = means()
    assert found["depth_change"] == pytest.approx(0.5) and found["depth_norm"] == pytest.approx(0.632 * 2**8, rel=0.1)
    weight.data.div_(2)
    made(ids, labels=ids, num_steps=(6, 2))
    assert means()["depth_change"] == pytest.approx(0, abs=1e-6)
