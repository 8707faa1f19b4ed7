"""The wavefront against a plain writing of it, and what its options promise."""

from math import ceil

import pytest
import torch
from looped import GREEDY, PROMPT, R, decode, model_of, progress

from riverrun.eval.decoding.generate import Sampling
from riverrun.eval.decoding.recurrent_depth.diffusion import Diffusion, Wavefront
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.layout import Layout

WARM = Sampling(temperature=0.7, top_p=0.9)


class ByHand:
    """Greedy, of one position after the other. Freezing runs everything again over the frozen tokens: the prelude, of
    each slot the last iteration of the step, and the coda."""

    def __init__(self, model, options, first, wanted, seed=0):
        self.model, self.body, self.o = model, model.model, options
        cache = progress(model, [first], slots=options.slots).cache
        layers, (a, b), core = cache.layers, (len(self.body.prelude), cache.outside), cache.core
        self.prelude, self.coda = layers[:a], layers[a:b]
        self.slots = [layers[b + i * core : b + (i + 1) * core] for i in range(options.slots)]
        self.seen, self.random = len(PROMPT), torch.Generator().manual_seed(seed)
        self.text, self.had, self.widths = [], [], []
        self.places = [self.place(first, 0)]  # dictionaries, of each active position
        self.wanted, self.begun = wanted, 1

    def place(self, token, offset):
        layout = Layout.of_rows((1, 1), torch.tensor([self.seen + offset]))
        h = self.body.options.hidden_size
        s = self.body.initial_state(torch.empty(1, 1, h, dtype=torch.float64), layout)[0, 0]
        return {"token": token, "s": s, "e": None, "had": 0}

    def layout(self, width):
        layout, seen = Layout.of_rows((1, width), torch.tensor([self.seen])), RiverrunCache(0)
        seen.seen = self.seen
        self.body.prepare_attention(layout, seen, torch.float64)
        return layout

    def step(self):
        o, body, active = self.o, self.body, self.places
        self.widths.append(len(active))
        layout, ids = self.layout(len(active)), torch.tensor([[place["token"] for place in active]])
        e = body.run(body.prelude, body.embed(ids), layout, [dict(states) for states in self.prelude])
        for i, place in enumerate(active):
            place["e"] = e[0, i] if place["e"] is None else o.ema * place["e"] + (1 - o.ema) * e[0, i]
        e = torch.stack([place["e"] for place in active])[None]
        s = torch.stack([place["s"] for place in active])[None]
        if o.noise:
            random = torch.empty_like(s).normal_(generator=self.random) * body.depth.initial_std
            for i, place in enumerate(active):
                beta = o.noise / (1 + place["had"])
                s[0, i] = (1 - beta) * s[0, i] + beta * random[0, i]
        entered = {}
        for t in range(o.inner_steps):
            entered[t % o.slots] = s
            s = body.core.iterate(s, e, layout, [dict(states) for states in self.slots[t % o.slots]])
        left = body.norm(body.core.injection.read_out(s))
        hidden = body.norm(body.run(body.coda, left, layout, [dict(states) for states in self.coda]))
        drawn = self.model.lm_head(hidden)[0].argmax(-1).tolist()

        frozen, changing = 0, False
        for i, place in enumerate(active):
            change = float((s[0, i] - place["s"]).norm() / s[0, i].norm())
            place["s"], place["had"] = s[0, i], place["had"] + o.inner_steps
            if i and drawn[i - 1] != place["token"]:
                changing, place["token"] = True, drawn[i - 1]
            if frozen == i and not changing and (place["had"] >= R or change < o.threshold):
                frozen += 1
        if frozen:
            short = self.layout(frozen)
            body.run(body.prelude, body.embed(ids[:, :frozen]), short, self.prelude)
            for slot, before in entered.items():
                body.core.iterate(before[:, :frozen], e[:, :frozen], short, self.slots[slot])
            body.run(body.coda, left[:, :frozen], short, self.coda)
        self.seen += frozen
        self.text += drawn[:frozen]
        self.had += [place["had"] for place in active[:frozen]]
        self.places = active[frozen:]
        number = min(o.headway, o.max_wavefront - len(self.places), self.wanted - self.begun)
        self.begun += max(number, 0)
        if number > 0:
            others = torch.randint(40, (1, number - 1), generator=self.random)[0].tolist()
            self.places += [self.place(t, len(self.places) + i) for i, t in enumerate([drawn[-1], *others])]


@pytest.mark.parametrize("core", ["attention", "attention, window", "gated_delta", "mixed", "recurrent throughout"])
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0, "inner_steps": 2}, {"threshold": 0.5},
        {"threshold": 0.9, "inner_steps": 2, "slots": 2, "ema": 0.0},
        {"threshold": 0.9, "inner_steps": 2, "noise": 0.3, "headway": 2, "max_wavefront": 5, "ema": 0.4},
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_wavefront_is_the_plain_writing(core, options):
    model, o = model_of(core), Diffusion(**options)
    state = progress(model, [5], slots=o.slots, wanted=14)
    got = torch.cat(list(o.tokens(state)), dim=1)[0].tolist()
    hand = ByHand(model, o, 5, 14)
    while hand.places:
        hand.step()
    assert got == hand.text and len(set(got)) > 3
    assert state.had.total() == 14 and sorted(state.had.elements()) == sorted(hand.had)
    assert state.calls == o.inner_steps * len(hand.widths)
    assert state.iterations == o.inner_steps * sum(hand.widths) and max(hand.widths) > 1
    assert state.cache.seen == len(PROMPT) + 14
    layers = [*hand.prelude, *hand.coda, *(states for slot in hand.slots for states in slot)]
    for mine, other in zip(state.cache.layers, layers, strict=True):
        for name in other:
            torch.testing.assert_close(mine[name], other[name], rtol=1e-9, atol=1e-9)


def test_tokens_converge_before_their_text_is_over():
    """The tests above see early exits, changed drafts, and waiting heads."""
    model, o = model_of("attention"), Diffusion(threshold=0.9, inner_steps=2, max_wavefront=5)
    hand = ByHand(model, o, 5, 14)
    with torch.no_grad():
        while hand.places:
            hand.step()
    assert min(hand.had) < R and len(set(hand.had)) > 1


@pytest.mark.parametrize("inner", [1, 3, 4, 8])
def test_the_fixed_schedule(inner):
    """⌈r/r'⌉ active tokens, each with as many iterations: one leaves and one comes at every step."""
    model, number, depth = model_of("gated_delta"), 20, ceil(R / inner)
    result = decode(model, f"diffusion:threshold=0,inner_steps={inner}", number + 1)
    assert result.had == {depth * inner: number}
    assert result.calls == inner * (number + depth - 1) and result.iterations == inner * depth * number


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
def test_a_token_has_r_iterations_at_most(threshold):
    for core in ("attention", "gated_delta"):
        result = decode(model_of(core), f"diffusion:threshold={threshold},inner_steps=3,noise=0.2", 25, WARM)
        assert max(result.had) <= ceil(R / 3) * 3 and result.had.total() == 24


def test_a_wavefront_of_one_is_adaptive_decoding():
    model = model_of("gated_delta")
    result = decode(model, "diffusion:max_wavefront=1,inner_steps=1,threshold=0.2,ema=0", 20)
    assert result.calls == result.iterations and len(result.had) > 1
    adaptive = decode(model, "adaptive:exit=latent,threshold=0.2", 20)
    assert (result.tokens, result.had) == (adaptive.tokens, adaptive.had)


def test_drafts_of_a_standing_wave_are_limited():
    model = model_of("attention")
    wide, narrow = (
        decode(model, f"diffusion:threshold=0,inner_steps=1,max_wavefront={width}", 20) for width in (128, 3)
    )
    assert narrow.iterations <= 3 * narrow.calls and wide.iterations > 5 * (wide.calls - 2 * R)
    assert narrow.calls > wide.calls


@torch.no_grad()
def test_random_numbers_stay_with_their_places():
    """A token drawn again from the same logits is the same."""
    state = progress(model_of("attention"), [5], slots=1, sampling=Sampling(temperature=5.0, top_p=1.0))
    wave = Wavefront(Diffusion(threshold=0.0, inner_steps=2, ema=0.0), state)
    for _ in range(3):
        wave.step()
        wave.advance()
    noise = wave.noise.clone()
    wave.step()
    again = state.choice.choose(state.logits(wave.window.finish(wave.s)[0]), noise)
    assert torch.equal(wave.drawn, again) and len(set(wave.drawn.tolist())) > 1
    wave.advance()
    kept = noise[-(len(wave.noise) - 1) :]
    assert torch.equal(wave.noise[:-1], kept)


def test_the_seed_decides():
    model, spec = model_of("gated_delta"), "diffusion:inner_steps=2,noise=0.5"
    first = decode(model, spec, 20, WARM, seed=1)
    assert first.tokens == decode(model, spec, 20, WARM, seed=1).tokens != decode(model, spec, 20, WARM, seed=2).tokens
    assert decode(model, spec, 20, GREEDY, seed=1).tokens != first.tokens
