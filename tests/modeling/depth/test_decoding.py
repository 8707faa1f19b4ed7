"""Decoding with recurrent depth: prompts in parts, states of every iteration or shared ones, padding, generation."""

import itertools
from dataclasses import replace

import pytest
import torch

from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.depth.cache import DepthCache
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import MIXERS
from tests.modeling.depth.shapes import DEPTH, HUGINN, PARCAE, SHAPES, around, assert_close, build, tokens
from tests.modeling.test_model import BASE as EVERY_MIXER

every_shape = pytest.mark.parametrize("shape", SHAPES)
SPLITS = {"1+rest": [1, 17], "k+1+1+…": [11] + [1] * 7, "all steps": [1] * 18, "chunks": [3, 9, 2, 4]}


def in_calls(model, ids, sizes, cache=None, **options):
    """Logits of rows that are fed to one cache in pieces."""
    cache = model.make_cache() if cache is None else cache
    logits = [model(piece, past_key_values=cache, **options).logits for piece in ids.split(sizes, dim=1)]
    assert cache.seen == ids.shape[1] == sum(sizes)
    return torch.cat(logits, dim=1)


@every_shape
@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_prefill_and_steps_equal_the_full_forward(shape, split):
    model, ids = build(shape), tokens(2, 18)
    assert_close(in_calls(model, ids, SPLITS[split], num_steps=3), model(ids, num_steps=3).logits)


@every_shape
@torch.no_grad()
def test_packed_documents_equal_separate_rows(shape):
    model, ids = build(shape), tokens(2, 16)
    bounds = [0, 1, 6, 16, 25, 32]
    packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).logits.flatten(0, 1)
    for start, stop in itertools.pairwise(bounds):
        assert_close(packed[start:stop], model(ids.flatten()[None, start:stop]).logits[0])


@every_shape
@torch.no_grad()
def test_decoding_goes_on_from_packed_and_padded_prompts(shape):
    model, ids, new = build(shape), tokens(2, 9), tokens(2, 3, seed=2)
    packed = model(ids, cu_seqlens=torch.tensor([0, 4, 9, 18], dtype=torch.int32), use_cache=True).past_key_values
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    padded = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for cache in (packed, padded):
        got = torch.cat([model(piece, past_key_values=cache).logits for piece in new.split(1, dim=1)], dim=1)
        for row, start in enumerate([4, 0]):
            alone = model(torch.cat([ids[row, start:], new[row]])[None]).logits[0, -3:]
            assert_close(got[row], alone)


@torch.no_grad()
def test_left_padded_rows_equal_unpadded_ones():
    model, ids = build("gated_delta, diagonal"), tokens(3, 10)
    lengths = [10, 6, 1]
    mask = torch.stack([torch.arange(10) >= 10 - n for n in lengths]).long()
    logits = model(ids, attention_mask=mask).logits
    for row, n in enumerate(lengths):
        assert_close(logits[row, 10 - n :], model(ids[row : row + 1, 10 - n :]).logits[0])


@every_shape
@torch.no_grad()
def test_beams_can_be_picked(shape):
    model, ids, new = build(shape), tokens(3, 7), tokens(4, 1)
    cache = model(ids, use_cache=True).past_key_values.reorder_cache(torch.tensor([2, 2, 0, 1]))
    expected = model(torch.cat([ids[[2, 2, 0, 1]], new], dim=1)).logits[:, -1:]
    assert_close(model(new, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("shape", ["attention", "mamba2, para_lstm"])
@torch.no_grad()
def test_generate_takes_the_likeliest_token_of_full_forwards(shape):
    model, prompt = build(shape), tokens(2, 5)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    by_steps = {}
    for r in (None, 2):
        by_steps[r], expected = model.generate(prompt, num_steps=r, **options), prompt
        for _ in range(6):
            expected = torch.cat([expected, model(expected, num_steps=r).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(by_steps[r], expected)
    assert not torch.equal(*by_steps.values())
    shared = model.generate(prompt, past_key_values=model.make_cache(slots=1), **options)
    cache, expected = model.make_cache(slots=1), prompt
    for _ in range(6):
        logits = model(expected[:, cache.seen :], past_key_values=cache).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(shared, expected)


# slots that iterations share


def shared_by_hand(model, pieces, r, slots):
    """Logits of the pieces, and the slots after them: of each a dictionary of states a layer, replaced at the end of a
    call by those of the last iteration that has it."""
    body = model.model
    kept = [[{} for _ in body.core.layers] for _ in range(slots)]
    around_core = [{} for _ in (*body.prelude, *body.coda)]
    mask_cache, logits = RiverrunCache(0), []
    for piece in pieces:
        layout = Layout.of_rows(piece.shape, piece.new_full((len(piece),), mask_cache.seen))
        x = body.embed(piece)
        body.prepare_attention(layout, mask_cache, x.dtype)
        e = body.run(body.prelude, x, layout, around_core)
        s, last = body.initial_state(e, layout), {}
        for t in range(r):
            last[t % slots] = [dict(states) for states in kept[t % slots]]
            s = body.core.iterate(s, e, layout, last[t % slots])
        for slot, states in last.items():
            kept[slot] = states
        x = body.norm(body.core.injection.read_out(s))
        x = body.norm(body.run(body.coda, x, layout, around_core[len(body.prelude) :]))
        logits.append(model.lm_head(x))
        mask_cache.advance(layout.positions, layout.sequence)
    return torch.cat(logits, dim=1), kept


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("shape", ["attention", "attention, diagonal", "gated_delta", "mamba2, para_lstm"])
@torch.no_grad()
def test_slots_hold_the_last_iterates(shape, slots):
    model, ids, r = build(shape), tokens(2, 12), 5
    sizes = [5, 1, 1, 4, 1]
    cache = model.make_cache(slots)
    logits = in_calls(model, ids, sizes, cache, num_steps=r)
    expected, kept = shared_by_hand(model, ids.split(sizes, dim=1), r, slots)
    assert_close(logits, expected)
    assert_close(logits[:, :5], model(ids[:, :5], num_steps=r).logits)
    layers = len(model.model.core.layers)
    assert len(cache.layers) == 2 + slots * layers
    for i, states in enumerate(state for slot in kept for state in slot):
        assert cache.layers[2 + i].keys() == states.keys()
        assert all(torch.equal(cache.layers[2 + i][name], state) for name, state in states.items())
    assert not torch.allclose(logits, model(ids, num_steps=r).logits), "sharing must make a difference here"


@torch.no_grad()
def test_with_a_slot_for_each_iteration_nothing_is_shared():
    model, ids = build("gated_delta"), tokens(2, 12)
    cache = model.make_cache(slots=4)
    assert torch.equal(in_calls(model, ids, [6, 6], cache, num_steps=4), in_calls(model, ids, [6, 6], num_steps=4))


@torch.no_grad()
def test_shared_slots_take_any_number_of_iterations_and_others_do_not():
    model, ids, new = build("attention"), tokens(2, 6), tokens(2, 1)
    own, shared = model.make_cache(), model.make_cache(slots=2)
    for cache in (own, shared):
        model(ids, past_key_values=cache, num_steps=5)
    with pytest.raises(
        ValueError, match=r"num_steps=4 cannot go on from a cache of num_steps=5.*make_cache\(slots=1\)"
    ):
        model(new, past_key_values=own, num_steps=4)
    before = own.num_bytes()
    assert own.seen == 6 and model(new, past_key_values=own, num_steps=5).logits.isfinite().all()
    assert own.num_bytes() > before
    assert model(new, past_key_values=shared, num_steps=8).logits.isfinite().all()
    with pytest.raises(ValueError, match="num_steps=1 would leave some of the 2 slots without these tokens"):
        model(new, past_key_values=shared, num_steps=1)
    assert shared.seen == 7


def test_caches_that_do_not_fit_are_refused():
    model, ids = build("attention"), tokens(1, 4)
    with pytest.raises(ValueError, match=r"make one by model.make_cache\(\)"):
        model(ids, past_key_values=RiverrunCache(4))
    for slots in (0, -1):
        with pytest.raises(ValueError, match="must be at least 1"):
            model.make_cache(slots)
    with pytest.raises(ValueError, match="leave slots out"):
        build(replace(HUGINN, depth=None)).make_cache(slots=1)
    assert isinstance(model.make_cache(), DepthCache)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_mixers_leave_the_states_that_they_start_from(mixer):
    """What sharing rests on: a state is replaced in its dictionary, never written into."""
    options = replace(EVERY_MIXER, layer_pattern=(mixer,), num_hidden_layers=1)
    block = build(options, torch.float32).model.layers[0]
    body, cache = build(options, torch.float32).model, RiverrunCache(1)
    for length in (9, 1, 4):
        layout = Layout.of_rows((2, length), torch.full((2,), cache.seen))
        x = torch.randn(2, length, options.hidden_size)
        body.prepare_attention(layout, cache, x.dtype)
        before = {name: (state, state.clone()) for name, state in cache.layers[0].items()}
        block(x, layout, cache.layers[0])
        assert cache.layers[0]
        for name, (state, copied) in before.items():
            assert torch.equal(state, copied), name
        cache.advance(layout.positions, layout.sequence)


# what else layers of a core can be


@torch.no_grad()
def test_a_core_reads_a_prefix():
    attention = replace(EVERY_MIXER.prefix_linear_attention, encoder=True)
    options = replace(around(PARCAE, "prefix_linear_attention"), prefix_linear_attention=attention)
    model, ids = build(options), tokens(2, 12)
    cache = model.make_cache()
    logits = torch.cat([
        model(ids[:, :7], past_key_values=cache, prefix=5).logits, model(ids[:, 7:], past_key_values=cache).logits,
    ], dim=1)  # fmt: skip
    assert_close(logits, model(ids, prefix=5).logits)
    assert not torch.allclose(logits, model(ids).logits)


@torch.no_grad()
def test_steps_by_themselves_are_the_forward_pass():
    """What samplers put together in their own way."""
    for shape in ("attention", "gated_delta, diagonal"):
        model, ids = build(shape), tokens(2, 8)
        body, cache = model.model, model.make_cache(slots=1)
        layout = Layout.of_rows((2, 8), torch.zeros(2, dtype=torch.long))
        x = body.embed(ids)
        body.prepare_attention(layout, cache, x.dtype)
        e = body.run(body.prelude, x, layout, cache.layers)
        s = body.initial_state(e, layout)
        for states in cache.iterations(DEPTH.mean_recurrence):
            s = body.core.iterate(s, e, layout, states)
        hidden = body.finish(s, layout, cache)
        assert_close(model.lm_head(hidden), model(ids).logits)
        assert_close(model.hidden_states(ids, Layout.of_rows((2, 8), torch.zeros(2, dtype=torch.long))), hidden)
        assert cache.seen == 8 and all(cache.layers)
