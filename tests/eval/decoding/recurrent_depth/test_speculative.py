"""Drawn tokens have the full model's distribution, whatever the drafts."""

from dataclasses import replace

import torch
from looped import HUGINN, PROMPT, around, decode, model_of, progress

from riverrun.eval.decoding.generate import Sampling
from riverrun.eval.decoding.recurrent_depth.choice import Choice
from riverrun.eval.decoding.recurrent_depth.speculative import Draft, Speculative, judge
from tests.modeling.depth.shapes import build

V, R, DRAWS = 5, 3, 500
SAMPLING = Sampling(temperature=0.8, top_p=0.9)


def chi_squared(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic, infinite where something impossible came."""
    expected = p * counts.sum()
    assert not counts[p == 0].any()
    return float(((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum())


def far(p: torch.Tensor) -> float:
    """What the statistic exceeds once in a million times, by Wilson and Hilferty."""
    n = int((p > 0).sum()) - 1
    return n * (1 - 2 / (9 * n) + 4.75 * (2 / (9 * n)) ** 0.5) ** 3


@torch.no_grad()
def of_pairs(model, num_steps: int, first: int) -> torch.Tensor:
    """(V · V,) probabilities of the two tokens after the prompt and `first`, by full forward passes."""
    choice = Choice(SAMPLING, 0, torch.device("cpu"))
    prompt = [token % V for token in PROMPT] + [first]

    def p(ids):
        return choice.probabilities(model(torch.tensor([ids]), num_steps=num_steps).logits[0, -1:])[0]

    return torch.cat([p(prompt)[a] * p([*prompt, a]) for a in range(V)])


@torch.no_grad()
def test_texts_have_the_distribution_of_the_full_model(monkeypatch):
    model = build(replace(around(HUGINN, "attention"), vocab_size=V), seed=1)
    first, sampler = 3, Speculative(draft_tokens=2, draft_steps=1)
    monkeypatch.setattr("looped.PROMPT", [token % V for token in PROMPT])
    state = progress(model, [first], wanted=2, num_steps=R, sampling=SAMPLING)
    prompt, pairs = state.cache, torch.zeros(V * V)
    for _ in range(DRAWS):
        state.cache = prompt
        a, b = torch.cat(list(sampler.tokens(state)), dim=1)[0].tolist()
        pairs[a * V + b] += 1
    p, q = of_pairs(model, R, first), of_pairs(model, 1, first)
    assert chi_squared(pairs, p) < far(p)
    spoiled = (p - q).square()[p > 0] / p[p > 0] * DRAWS  # of drafts that are all kept
    assert spoiled.sum() > 3 * far(p), "the drafts must be bad enough for the test to tell"
    assert state.had[R] > 1.1 * DRAWS  # several tokens a round, sometimes


@torch.no_grad()
def test_a_rejected_draft_is_drawn_from_what_is_left():
    """Of every place: p, whatever q, with zeros in either."""
    choice = Choice(Sampling(temperature=1.0, top_p=1.0), 0, torch.device("cpu"))
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.1, 0.0, 0.6, 0.3], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    counts, kept = torch.zeros(3, 4), torch.zeros(3)
    for _ in range(6000):
        drafts = []
        for row in q.log():
            token = choice.choose(row[None])
            drafts.append(Draft(None, None, None, row[None], token[:, None]))
        number, tokens = judge(choice, p.log(), drafts)
        for i in range(number):
            counts[i, tokens[i]] += 1
        kept[number - 1] += 1
    for i in range(3):
        assert chi_squared(counts[i], p[i]) < far(p[i])
        if i != 1:  # where p = q, every draft is kept
            assert chi_squared(q[i] * counts[i].sum(), torch.where(p[i] > 0, p[i], 1e-9)) > 3 * far(p[i])
    accepted = torch.minimum(p, q).sum(1)  # of each place, the chance that its draft is kept
    stops = torch.stack([1 - accepted[0], accepted[0] * (1 - accepted[1]), accepted[0] * accepted[1]])
    assert chi_squared(kept, stops) < far(stops)


def test_drafts_save_calls_where_they_are_good():
    """A contraction's first iterations say what the last ones say."""
    model = model_of("contraction")
    good = decode(model, "speculative:draft_tokens=5,draft_steps=12", 41, num_steps=32)
    assert good.tokens == decode(model, "ar", 41, num_steps=32).tokens
    assert good.calls == 8 * (5 * 12 + 20) and good.iterations == 40 * 32  # nothing is dropped, nothing done twice
