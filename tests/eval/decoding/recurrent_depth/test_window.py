"""The active window: passes leave the base as it is, and freezing equals having read fewer tokens."""

from dataclasses import replace

import pytest
import torch
from looped import CORES, PROMPT, R, model_of

from riverrun.eval.decoding.recurrent_depth.sampler import read_prompt
from riverrun.eval.decoding.recurrent_depth.window import Window
from riverrun.modeling.mixers import MIXERS
from tests.modeling.depth.shapes import HUGINN, around, build, tokens
from tests.modeling.test_model import BASE as EVERY_MIXER

W = 7


def passes(window, ids, s, slots):
    """Passes of the prelude, of the slots one after the other, and of the coda, from given states."""
    e, prelude = window.read(ids)
    drive, core = window.body.core.injection.drive(e), []
    for slot in range(slots):
        s, done = window.iterate(s, drive, slot)
        core.append(done)
    hidden, coda = window.finish(s)
    return hidden, prelude, core, coda


def copied(cache):
    return [{name: state.clone() for name, state in states.items()} for states in cache.layers]


def assert_states(got, expected, rtol=1e-9):
    assert len(got) == len(expected)
    for mine, other in zip(got, expected):
        assert mine.keys() == other.keys()
        for name, state in mine.items():
            assert state.shape == other[name].shape, name
            torch.testing.assert_close(state, other[name], rtol=rtol, atol=rtol * float(other[name].abs().max() + 1))


def assert_freezes(model, slots, counts, rtol):
    body, ids = model.model, tokens(1, W, seed=3)
    base, _ = read_prompt(model, PROMPT, slots, R)
    before = copied(base)
    s = torch.randn(1, W, body.options.hidden_size, dtype=body.embed_tokens.weight.dtype)
    window = Window(body, base, W)
    hidden, *done = passes(window, ids, s, slots)
    for number in counts:
        alone = Window(body, base, number)
        some, *fewer = passes(alone, ids[:, :number], s[:, :number], slots)
        torch.testing.assert_close(hidden[:, :number], some, rtol=rtol, atol=rtol)
        got, expected = window.freeze(number, *done), alone.freeze(number, *fewer)
        assert_states(got.layers, expected.layers, rtol)
        assert got.seen == expected.seen == len(PROMPT) + number
        assert got.next_position.tolist() == [len(PROMPT) + number]
    assert_states(base.layers, before, 0)
    assert base.seen == len(PROMPT)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("core", CORES)
@torch.no_grad()
def test_freezing_equals_reading_fewer_tokens(core, slots):
    assert_freezes(model_of(core), slots, range(1, W + 1), 1e-9)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_every_mixer_can_be_frozen(mixer):
    """Everywhere: in the prelude, the core and the coda."""
    depth = replace(HUGINN.depth, prelude_layers=1, coda_layers=1)
    options = replace(EVERY_MIXER, layer_pattern=(mixer,), num_hidden_layers=3, depth=depth)
    assert_freezes(build(options), 2, [3], 1e-9)


@torch.no_grad()
def test_rows_are_frozen_one_by_one():
    """Slots are rows of one call, beside the rows that there are."""
    model = build(around(HUGINN, "gated_delta", "mamba2"))
    body, ids = model.model, tokens(3, W, seed=3)
    base, _ = read_prompt(model, PROMPT, 2, R)
    base.reorder_cache(torch.zeros(3, dtype=torch.long))
    s = torch.randn(3, W, body.options.hidden_size, dtype=torch.float64)
    window = Window(body, base, W)
    frozen = window.freeze(4, *passes(window, ids, s, 2)[1:])
    for row in range(3):
        single, _ = read_prompt(model, PROMPT, 2, R)
        alone = Window(body, single, W)
        expected = alone.freeze(4, *passes(alone, ids[row : row + 1], s[row : row + 1], 2)[1:])
        rows = [{name: state[row : row + 1] for name, state in states.items()} for states in frozen.layers]
        assert_states(rows, expected.layers)
