"""s_0: how it is distributed, and that it follows from keys alone."""

import math

import pytest
import torch

from riverrun.modeling.depth import initial_state as module
from riverrun.modeling.depth.initial_state import draw, initial_state, token_keys
from riverrun.modeling.layout import Layout
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import Axis

CHANNELS = 48


def rows(B: int, T: int, start: int = 0) -> Layout:
    return Layout.of_rows((B, T), torch.full((B,), start))


def states(layout: Layout, keys: torch.Tensor | None, std: float = 1.0, tp: Axis | None = None) -> torch.Tensor:
    B, T = layout.shape
    if tp is None:
        return initial_state(layout, keys, torch.empty(B, T, CHANNELS), std)
    return initial_state(layout, keys, torch.empty(B * T // tp.size, CHANNELS), std, tp)


def test_numbers_are_a_normal_distribution_cut_at_three_deviations():
    x = states(rows(8, 4096), torch.arange(8), std=2.0).double() / 2
    assert x.abs().max() < 3 and x.abs().max() > 2.99
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    inside = math.erf(3 / math.sqrt(2))
    std = math.sqrt(1 - 6 * density / inside)
    assert std == pytest.approx(0.9866, abs=1e-4)
    n = x.numel()  # 1.5 million
    assert abs(x.mean()) < 4 * std / math.sqrt(n)
    assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n))
    assert (x**3).mean().abs() < 4 * math.sqrt(15 / n)
    for edge in (-2.0, -1.0, -0.3, 0.5, 1.5, 2.5):
        below = (math.erf(edge / math.sqrt(2)) + inside) / (2 * inside)
        assert (x < edge).double().mean().item() == pytest.approx(below, abs=4 * math.sqrt(0.25 / n))


def test_neighbours_of_all_kinds_are_independent():
    """Tokens, channels, rows with keys that follow each other, and whether numbers are large together."""
    x = states(rows(6, 512), torch.arange(6)).double()
    for a, b in ((x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1]), (x[1:], x[:-1]), (x[:, 64:], x[:, :-64])):
        for f in (lambda v: v, lambda v: v.square() - v.square().mean()):
            correlation = (f(a) * f(b)).mean() / (f(a).std() * f(b).std())
            assert correlation.abs() < 4.5 / math.sqrt(a.numel())
    flat = x.flatten(0, 1)
    assert flat.unique(dim=0).shape == flat.shape
    gram = (flat @ flat.T / CHANNELS - torch.eye(len(flat))).triu(1)
    assert gram.abs().max() < 7 / math.sqrt(CHANNELS)


def test_keys_are_rows_and_places_in_them():
    keys = torch.tensor([3, -1, 2**40 + 3, 2**62, 3 + 2**32])
    x = states(rows(5, 7), keys)
    assert len({tuple(row.flatten().tolist()) for row in x}) == 5, "all 64 bits of a key count"
    order = torch.tensor([4, 0, 2])
    assert torch.equal(states(rows(3, 7), keys[order]), x[order])
    assert torch.equal(states(rows(5, 4), keys), x[:, :4])
    packed = Layout.of_documents((5, 7), torch.tensor([0, 2, 7, 14, 15, 21, 28, 35], dtype=torch.int32))
    assert torch.equal(states(packed, keys), x)


def test_without_keys_a_sequence_has_the_same_states_wherever_it_stands():
    x = states(rows(1, 9), None)[0]
    assert torch.equal(states(rows(2, 4, start=5), None), x[5:].expand(2, -1, -1))
    packed = states(Layout.of_documents((1, 12), torch.tensor([0, 3, 12], dtype=torch.int32)), None)[0]
    assert torch.equal(packed[:3], x[:3]) and torch.equal(packed[3:], x)
    padded = states(Layout.of_left_padded(torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])), None)
    assert torch.equal(padded[0, 3:], x[:2]) and torch.equal(padded[1], x[:5])


@pytest.mark.parametrize("keys", [None, torch.tensor([7, 8])], ids=["positions", "rows"])
def test_ranks_have_parts_of_the_whole(keys):
    bounds = [0, 3, 8, 11, 16]
    whole = states(Layout.of_documents((2, 8), torch.tensor(bounds, dtype=torch.int32)), keys)
    shards = [Layout.of_shard(Context.of_rows(Axis(2, cp, None), 2, 8, bounds, "cpu")) for cp in range(2)]
    assert torch.equal(torch.cat([states(shard, keys) for shard in shards], dim=1), whole)
    for cp, shard in enumerate(shards):
        parts = [states(shard, keys, tp=Axis(4, rank, None)) for rank in range(4)]
        assert torch.equal(torch.cat(parts), whole[:, 4 * cp : 4 * cp + 4].flatten(0, 1))


def test_what_is_drawn_at_a_time_changes_nothing(monkeypatch):
    keys = token_keys(rows(3, 10), torch.arange(3)).flatten(0, 1)
    assert keys.min() >= 0 and keys.max() < 2**32
    whole = draw(keys, CHANNELS, 1.0)
    for chunk in (1, 3 * CHANNELS, 29 * CHANNELS):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert torch.equal(draw(keys, CHANNELS, 1.0), whole)


def test_type_scale_and_zeros():
    layout, keys = rows(2, 3), torch.arange(2)
    one = states(layout, keys)
    assert torch.equal(states(layout, keys, std=0.5), 0.5 * one)
    half = initial_state(layout, keys, torch.empty(2, 3, CHANNELS, dtype=torch.bfloat16), 1.0)
    assert torch.equal(half, one.bfloat16())
    assert not states(layout, keys, std=0).any()
