"""Tokens are drawn as `generate` draws them; exits and options."""

import pytest
import torch
from looped import GREEDY, PROMPT, R, decode, model_of, progress

from riverrun.eval.decoding.generate import Sampling, generate
from riverrun.eval.decoding.recurrent_depth.choice import Choice
from riverrun.eval.decoding.recurrent_depth.exits import KL, Argmax, Latent
from riverrun.eval.decoding.recurrent_depth.registry import parse_sampler
from riverrun.eval.decoding.recurrent_depth.sampler import sample
from tests.modeling.depth.shapes import HUGINN, build

CPU = torch.device("cpu")


def test_frequencies_are_those_of_generate():
    model, sampling = model_of("attention"), Sampling(temperature=1.5, top_k=12, top_p=0.8)
    logits = model(torch.tensor([PROMPT])).logits[0, -1:].detach()
    choice = Choice(sampling, 1, CPU)
    p = choice.probabilities(logits)[0]
    drawn = choice.choose(logits.expand(20_000, -1))
    frequency = torch.bincount(drawn, minlength=len(p)) / 20_000
    assert (frequency - p).abs().max() < 0.02 and 2 <= (p > 0).sum() <= 12
    options = {"max_new_tokens": 1, "eos_id": None, "num_samples": 2000}
    theirs = generate(model, PROMPT, sampling, **options).tokens
    other = torch.bincount(torch.tensor(theirs).flatten(), minlength=len(p)) / 2000
    assert (other - p).abs().max() < 0.05 and set(map(tuple, theirs)) <= {(int(i),) for i in p.nonzero()}
    ours = sample(model, PROMPT, parse_sampler("ar"), sampling, num_steps=None, **options).tokens
    mine = torch.bincount(torch.tensor(ours).flatten(), minlength=len(p)) / 2000
    assert (mine - p).abs().max() < 0.05


def test_greedy_choices_need_no_random_numbers():
    choice = Choice(GREEDY, 0, CPU)
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert choice.noise(logits) is None and torch.equal(choice.choose(logits), logits.argmax(-1))


def test_samples_are_decided_by_the_seed_alone():
    model, sampling = model_of("gated_delta"), Sampling(temperature=1.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for spec in ("ar", "adaptive", "speculative"):
        first = decode(model, spec, 10, sampling, seed=1).tokens
        assert (
            first
            == decode(model, spec, 10, sampling, seed=1).tokens
            != decode(model, spec, 10, sampling, seed=2).tokens
        )
    a, b = decode(model, "ar", 10, sampling, num_samples=2).tokens
    assert a != b and torch.equal(torch.get_rng_state(), before)


# exits


def test_kl_divergence_of_successive_outputs():
    s = torch.zeros(2, 1, 3)
    p = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]], [[0.6, 0.4], [0.9, 0.1]]])
    expected = 0.6 * torch.log(torch.tensor(1.2)) + 0.4 * torch.log(torch.tensor(0.8))
    for threshold, done in ((1.01 * expected, True), (0.99 * expected, False)):
        exit = KL(float(threshold))
        found = [exit(s, s, logits).tolist() for logits in p.log()]
        assert found == [[False, False], [done, True], [True, False]]


def test_change_of_the_latent_state():
    before = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]]])
    s = torch.tensor([[[3.0, 4.1]], [[3.0, 5.0]]])
    assert Latent(0.03)(before, s, None).tolist() == [True, False]
    assert Latent(0.1**0.5 / 34**0.5)(before, s, None).tolist() == [True, False]
    assert Latent(1.01 / 34**0.5)(before, s, None).tolist() == [True, True]


def test_argmax_is_stable_for_iterations_in_a_row():
    s, exit = torch.zeros(1, 1, 3), Argmax(3)
    found = [bool(exit(s, s, torch.eye(4)[token][None])) for token in (1, 2, 2, 2, 3, 3, 3, 3, 3, 0)]
    assert found == [False] * 7 + [True, True, False]


# what cannot be


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parrot", "there is no sampler 'parrot': .*choose from ar, adaptive, speculative, diffusion"),
        ("ar:slot=1", "did you mean slots"),
        ("ar:slots", "must look like key=value; keys of ar: slots"),
        ("ar:slots=0", "ar.slots=0 must be at least 1"),
        ("adaptive:slots=0", "adaptive.slots=0"),
        ("adaptive:exit=entropy", "adaptive.exit='entropy'"),
        ("adaptive:threshold=0", "adaptive.threshold=0.0 must be positive"),
        ("speculative:draft_tokens=0", "must be at least 1"),
        ("speculative:draft_steps=0", "must be at least 1"),
        ("diffusion:inner_steps=0", "diffusion.inner_steps=0 must be at least 1"),
        ("diffusion:headway=0", "diffusion.headway=0"),
        ("diffusion:max_wavefront=0", "diffusion.max_wavefront=0"),
        ("diffusion:threshold=-1", "diffusion.threshold=-1.0 must not be negative"),
        ("diffusion:ema=1", r"diffusion.ema=1.0 must be in \[0, 1\)"),
        ("diffusion:noise=1.5", r"diffusion.noise=1.5 must be in \[0, 1\]"),
        ("diffusion:slots=3", "diffusion.slots=3 must divide diffusion.inner_steps=4"),
    ],
)
def test_impossible_options_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_sampler(spec)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("ar:slots=9", {}, f"ar.slots=9 are more than the {R} iterations"),
        ("adaptive:slots=9", {}, f"adaptive.slots=9 are more than the {R} iterations"),
        ("speculative:draft_steps=8", {}, f"draft_steps=8 must be fewer than the {R} iterations"),
        ("diffusion:inner_steps=9", {}, f"inner_steps=9 must not be more than the {R} iterations"),
        ("speculative", {"num_samples": 2}, "one text at a time.*leave out --num-samples 2"),
        ("diffusion", {"num_samples": 2}, "one text at a time.*leave out --num-samples 2"),
        ("ar", {"num_steps": 0}, "num_steps=0 must be at least 1"),
        ("ar", {"num_samples": 0}, "must be at least 1"),
        ("ar", {"number": 0}, "max_new_tokens=0"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(spec, options, message):
    with pytest.raises(ValueError, match=message):
        decode(model_of("attention"), spec, **options)


def test_models_of_fixed_depth_are_refused():
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"this one's depth is fixed: leave out --sampler and --num-steps"):
        decode(build(replace(HUGINN, depth=None)), "ar")
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        sample(model_of("attention"), [], parse_sampler("ar"), GREEDY, max_new_tokens=3, eos_id=None)


def test_defaults_are_the_papers():
    adaptive, speculative, diffusion = map(parse_sampler, ("adaptive", "speculative", "diffusion"))
    assert (adaptive.exit, adaptive.slots, adaptive.continuous) == ("kl", 1, False)
    assert (speculative.draft_tokens, speculative.draft_steps) == (4, 4)
    assert (diffusion.inner_steps, diffusion.threshold, diffusion.ema, diffusion.noise) == (4, 0.03, 0.1, 0.0)
    assert (diffusion.headway, diffusion.max_wavefront, diffusion.slots) == (1, 128, 1)
    state = progress(model_of("attention"), [5], slots=1)
    assert state.cache.slots == 1 and state.cache.seen == len(PROMPT)
