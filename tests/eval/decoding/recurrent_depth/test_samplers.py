"""Which samplers decode the same texts, token for token."""

from functools import cache
from itertools import chain

import pytest
import torch
from looped import CORES, GREEDY, PROMPT, R, decode, full, model_of, progress

from riverrun.eval.decoding.generate import Sampling, generate
from riverrun.eval.decoding.recurrent_depth import sampler as sampling_loop
from riverrun.eval.decoding.recurrent_depth.registry import parse_sampler

every_core = pytest.mark.parametrize("core", CORES)
ALL = ["ar", "ar:slots=2", "adaptive", "adaptive:exit=latent", "speculative", "diffusion", "diffusion:threshold=0"]
WARM = Sampling(temperature=1.3, top_p=0.9)


@cache
def greedy(core):
    return decode(model_of(core), "ar", 16)


def drawn(sampler, state, number):
    """The next tokens (B, number) of a text on its way."""
    pieces, made = [], 0
    with torch.no_grad():
        for new in sampler.tokens(state):
            pieces.append(new)
            made += new.shape[1]
            if made >= number:
                return torch.cat(pieces, dim=1)[:, :number]


@every_core
def test_ar_is_the_full_model_greedily(core):
    model, result = model_of(core), greedy(core)
    assert result.tokens == [full(model, 16)] and len(set(result.tokens[0])) > 4
    assert result.calls == result.iterations == 15 * R and result.had == {R: 15}
    assert decode(model, "ar", 16, num_samples=3).tokens == result.tokens * 3
    assert decode(model, f"ar:slots={R}", 16).tokens == result.tokens


def test_ar_of_the_mean_is_generate():
    model = model_of("gated_delta")
    expected = generate(model, PROMPT, GREEDY, max_new_tokens=12, eos_id=None).tokens
    assert decode(model, "ar", num_steps=None).tokens == expected != decode(model, "ar", num_steps=1).tokens


def test_sharing_slots_makes_a_difference():
    shared = {core: decode(model_of(core), "ar:slots=1", 16) for core in CORES}
    assert all(shared[core].state_bytes < greedy(core).state_bytes for core in CORES)
    assert sum(shared[core].tokens != greedy(core).tokens for core in CORES) >= 3  # or nothing below would tell


@every_core
@pytest.mark.parametrize("options", ["draft_steps=1,draft_tokens=3", "draft_steps=7,draft_tokens=3", "draft_steps=4"])
def test_speculation_is_ar_token_for_token(core, options):
    result, expected = decode(model_of(core), f"speculative:{options}", 16), greedy(core)
    assert result.tokens == expected.tokens
    assert result.had == {R: 15} and result.state_bytes == expected.state_bytes
    if options == "draft_steps=4" and core == "gated_delta":  # good drafts pay
        assert result.calls < expected.calls


@torch.no_grad()
def test_drafts_of_all_kinds_are_judged():
    """Rounds in which no draft, some, and all are right."""
    model = model_of("gated_delta")
    expected = drawn(parse_sampler("ar"), progress(model, [5]), 24)
    pieces = list(parse_sampler("speculative:draft_steps=3").tokens(progress(model, [5], wanted=24)))
    assert torch.equal(torch.cat(pieces, dim=1), expected)
    kept = {piece.shape[1] for piece in pieces}
    assert {1, 4} <= kept and kept & {2, 3}


@every_core
@pytest.mark.parametrize(("sampling", "slots"), [(GREEDY, 1), (WARM, 2)], ids=["greedy", "drawn"])
def test_diffusion_of_whole_tokens_is_ar_with_shared_slots(core, sampling, slots):
    """r' = r, β = η = 0."""
    model = model_of(core)
    result = decode(model, f"diffusion:inner_steps={R},ema=0,noise=0,slots={slots}", sampling=sampling, seed=3)
    expected = decode(model, f"ar:slots={slots}", sampling=sampling, seed=3)
    assert result.tokens == expected.tokens and result.had == expected.had == {R: 11}
    assert result.calls == result.iterations == expected.calls


@every_core
@pytest.mark.parametrize("options", ["slots=1,exit=kl,threshold=1e-300", "slots=3,exit=latent,threshold=1e-300"])
def test_adaptive_without_an_exit_is_ar_with_shared_slots(core, options):
    model = model_of(core)
    result = decode(model, f"adaptive:{options}", num_samples=2)
    assert result.tokens == decode(model, f"ar:{options.partition(',')[0]}").tokens * 2 and result.had == {R: 22}


@pytest.mark.parametrize("core", ["attention", "gated_delta", "mixed"])
@pytest.mark.parametrize("options", ["exit=kl,threshold=3e-3", "exit=latent,threshold=0.3,slots=2", "exit=argmax"])
def test_adaptive_rows_are_those_of_single_ones(core, options):
    """Rows of one batch stop at unlike iterations."""
    model, sampler, firsts = model_of(core), parse_sampler(f"adaptive:{options}"), [3, 11, 25]
    together = progress(model, firsts, slots=sampler.slots, num_steps=12)
    rows = drawn(sampler, together, 6)
    alone = [progress(model, [first], slots=sampler.slots, num_steps=12) for first in firsts]
    for row, single in zip(rows, alone):
        assert torch.equal(drawn(sampler, single, 6)[0], row)
    assert together.had == sum((single.had for single in alone[1:]), alone[0].had)
    assert together.iterations == sum(single.iterations for single in alone) and len(together.had) > 1


def test_a_contraction_makes_all_samplers_agree_before_r():
    model = model_of("contraction")
    expected = decode(model, "ar", 30, num_steps=None)
    assert len(set(expected.tokens[0])) > 4
    exits = {
        "adaptive:threshold=1e-9": None, "adaptive:exit=latent,threshold=1e-4": None, "adaptive:exit=argmax": None,
        "adaptive:exit=latent,threshold=1e-4,continuous=true": None, "diffusion:threshold=1e-3": None,
        "diffusion:threshold=1e-3,inner_steps=2,noise=0.2,headway=2,max_wavefront=6": None,
    }  # fmt: skip
    for spec in exits:
        result = decode(model, spec, 30, num_steps=None)
        assert result.tokens == expected.tokens, spec
        assert result.mean_iterations < 28, spec
    continuous = decode(model, "adaptive:exit=latent,threshold=1e-4,continuous=true", 30, num_steps=None)
    assert continuous.had != decode(model, "adaptive:exit=latent,threshold=1e-4", 30, num_steps=None).had
    parallel = decode(model, "diffusion:threshold=1e-3", 30, num_steps=None)
    assert parallel.calls < expected.calls / 3


@pytest.mark.parametrize("spec", ALL)
def test_texts_end_with_the_end_of_sequence_token_or_after_enough(spec):
    model = model_of("gated_delta")
    for sampling in (GREEDY, WARM):
        free = decode(model, spec, 10, sampling).tokens[0]
        end = free[5]
        assert decode(model, spec, 10, sampling, eos_id=end).tokens[0] == free[: free.index(end) + 1]
    assert decode(model, spec, 10, WARM, eos_id=free[0]).tokens[0] == free[:1]
    whole = decode(model, spec, 10).tokens[0]
    for number in (1, 2, 5):
        assert decode(model, spec, number).tokens[0] == whole[:number]
    if spec in ALL[:4]:  # rows that end early wait
        rows = decode(model, spec, 10, WARM, num_samples=4).tokens
        ended = decode(model, spec, 10, WARM, num_samples=4, eos_id=rows[0][3]).tokens
        cut = [row[: row.index(rows[0][3]) + 1] if rows[0][3] in row else row for row in rows]
        assert ended == cut and len(set(map(len, cut))) > 1


@pytest.mark.parametrize("spec", ["ar", "speculative"])
def test_a_long_prompt_is_read_in_pieces(spec, monkeypatch):
    model = model_of("mixed")
    whole = decode(model, spec).tokens
    monkeypatch.setattr(sampling_loop, "PREFILL_CHUNK", 3)
    assert decode(model, spec).tokens == whole


class Recorder:
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("spec", ALL)
def test_tokens_are_streamed(spec):
    """Each once, and none after the end."""
    model, free = model_of("gated_delta"), decode(model_of("gated_delta"), spec, 12).tokens[0]
    for eos_id in (None, free[3], free[6]):
        recorder = Recorder()
        result = decode(model, spec, 12, streamer=recorder, eos_id=eos_id)
        prompt, *parts = recorder.parts
        assert prompt == PROMPT and [*chain(*parts)] == result.tokens[0] and recorder.ended
