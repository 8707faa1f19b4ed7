"""Controls of repetition: planted cases, and what every one of them must leave alone."""

import sys

import pytest
import torch
from eval_examples import exact_hybrid
from transformers import LogitsProcessorList

from riverrun.eval.decoding.contrastive import ContrastiveOptions, contrastive_search
from riverrun.eval.decoding.decode import decode
from riverrun.eval.decoding.dry import DRY, DRYOptions
from riverrun.eval.decoding.lz import LZ, LZOptions
from riverrun.eval.decoding.presence import Presence, PresenceOptions
from riverrun.eval.decoding.registry import DECODINGS, parse_decoding, parse_decodings
from riverrun.eval.decoding.rpg import RPG, RPGOptions
from riverrun.eval.models import load_model
from riverrun.eval.repetition.tree_lines import TreeLines
from riverrun.modeling.layout import Layout
from riverrun.train.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
V, EOS = BYTES.vocab_size, BYTES.eos_id
INF = float("inf")
PROCESSORS = [name for name in DECODINGS if name not in ("greedy", "contrastive", "typical", "sample")]


def after(processor, text, scores=None):
    scores = torch.zeros(V) if scores is None else scores
    tokens = BYTES.encode(text) if isinstance(text, str) else text
    return processor(torch.tensor([tokens]), scores[None])[0]


def changed(processor, text, scores=None):
    """{character: change} of all tokens whose logits change."""
    scores = torch.zeros(V) if scores is None else scores
    new = after(processor, text, scores)
    return {chr(i): round((new - scores)[i].item(), 4) for i in range(V) if new[i] != scores[i]}


# What holds for all


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_masked_stays_masked_and_rows_are_independent(name):
    processors = parse_decoding(name).processors(BYTES)
    texts = ["abcabcab", "xyxyxyxy", "x = 1\ny", "f(1)\nf(2)\n", "assert a\nassert b\n"]
    texts = [text.ljust(18, "q") if name != "rpg" else text.rjust(18) for text in texts]
    ids = torch.tensor([BYTES.encode(text) for text in texts])
    scores = torch.randn(len(texts), V)
    scores[:, ::3] = -INF
    before = scores.clone()
    together = processors(ids, scores)
    assert torch.equal(scores, before)  # the given ones are left as they are
    assert torch.isneginf(together[:, ::3]).all() and not together.isnan().any()
    for i in range(len(texts)):
        assert torch.equal(processors(ids[i : i + 1], scores[i : i + 1])[0], together[i])
    assert not torch.equal(together, scores)


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name not in ("presence", "repetition")])
def test_a_text_without_repeats_leaves_logits_as_they_are(name):
    scores = torch.randn(V)
    for text in ["a", "abcdefgh", "x = 1\nfor y in z:\n    pass\n"[:5]]:
        new = after(parse_decoding(name).processors(BYTES), text, scores)
        unseen = [i for i in range(V) if chr(i) not in text]
        assert torch.equal(new[unseen], scores[unseen])
        if name != "lz":  # which makes the tokens of its window cheaper than literals
            assert torch.equal(new, scores)


# Each by hand


def test_presence_and_frequency():
    assert changed(Presence(PresenceOptions(0.5, 0.25)), "aab") == {"a": -1.0, "b": -0.75}
    assert changed(Presence(PresenceOptions()), []) == {}


def test_dry_penalises_what_extends_a_repeat():
    dry = DRY(DRYOptions(), BYTES)
    assert changed(dry, "ababa") == {"b": -1.4}  # 0.8 · 1.75: 'aba' ended before b once, matched over 3
    assert changed(dry, "abcab") == {"c": -0.8}
    assert changed(dry, "abcb") == {}  # a match of one token is free
    assert changed(dry, "ab:xab") == {}  # breakers are never penalised
    assert changed(dry, "xy\nbxy\nb") == {}  # nor does a match reach beyond one
    assert changed(DRY(DRYOptions(breakers=""), BYTES), "xy\nbxy\n") == {"b": -1.4}
    assert changed(DRY(DRYOptions(range=4), BYTES), "abcab") == {}
    long = changed(dry, "ab" * 400)
    assert set(long) == {"a"} and long["a"] == pytest.approx(-0.8 * 1.75**48, rel=1e-5)


def test_lz_makes_a_continued_match_fall_against_literals():
    """a b c a b c a b ?: c loses rank. The costs are counted by hand, in bits."""
    lz = LZ(LZOptions())
    tokens = BYTES.encode("abcabcab")
    costs = lz.costs(tokens, 2**16)
    assert costs == pytest.approx({97: 1.0, 98: 0.0, 99: 0.26303}, abs=1e-4)  # log₂ 2, log₂ 1, log₂ 6/5
    scores = torch.zeros(V)
    scores[ord("c")] = 0.5
    assert after(lz, "abcabcab", scores).argmax() != ord("c") == scores.argmax()
    assert after(lz, "abcdefgh", scores)[ord("z")] == 0  # a literal's logit is left as it is


def test_lz_codes_short_matches_as_literals_where_they_are_cheaper():
    costs = LZ(LZOptions(window=512)).costs(BYTES.encode("abcxab"), 256)
    assert costs[ord("x")] == 8.0  # a match of one token: 9 + 0 > 8 bits
    assert costs[ord("c")] == pytest.approx(0.58496, abs=1e-4)  # log₂ 3/2: at one distance, a length of 3 after 2


def test_typical_keeps_the_typical():
    (_, warper) = parse_decoding("typical:mass=0.5").processors(BYTES)
    p = torch.full((V,), 1e-9)
    p[:5] = torch.tensor([0.9, 0.04, 0.03, 0.02, 0.01])
    kept = after(warper, "a", p.log())
    assert torch.isfinite(kept).nonzero().flatten().tolist() == [0]


# RPG

ASSERTS = "assert f(1) == 2\nassert f(2) == 3\nassert f([3]) == 4\n"
CHAIN = "if a == 1:\n    return 2\nelif a == 3:\n    return 4\nelif a == 4:\n    return 5\n"
SETTERS = "@x.setter\ndef f(self, v):\n    self._x = v\n@y.setter\ndef g(self, v):\n    self._y = v\n"


@pytest.mark.parametrize(
    ("text", "count", "tokens"),
    [
        (ASSERTS.replace("[3]", "3"), 3, "a"),
        (ASSERTS.replace("[3]", "3") + "\n  ", 3, "a"),
        (ASSERTS.replace("[3]", "3") + "as", 0, ""),
        (ASSERTS, 0, ""),  # the last one has another shape
        (CHAIN, 2, "e"),
        (CHAIN + "elif a == 9:\n    ", 0, ""),  # not the return in the middle of a copy
        (SETTERS, 2, "@"),
        (SETTERS + "@z.setter\n", 0, ""),
        ('d = {\n    "a": 1,\n    "b": 2,\n', 2, '"'),
        ('"""\nassert f(1)\nassert f(2)\n', 0, ""),  # in a string
        ("x = 1\ny = f(2)\nassert z\n", 0, ""),
    ],
)
def test_what_would_begin_another_copy(text, count, tokens):
    found, critical = RPG(RPGOptions(), BYTES).critical(BYTES.encode(text))
    assert (found.count if found else 0, "".join(map(chr, sorted(critical)))) == (count, tokens)


def test_modes_and_signs():
    text, scores = "f(1)\nf(2)\nf(3)\n", torch.zeros(V)
    for logit in (2.0, -2.0):
        scores[ord("f")] = logit
        (change,) = changed(RPG(RPGOptions(), BYTES), text, scores).values()
        assert change == pytest.approx(3 * -0.10536, abs=1e-4)  # 3 ln 0.9
        (change,) = changed(RPG(RPGOptions(mode="additive", kappa=2), BYTES), text, scores).values()
        assert change == -6
        (change,) = changed(RPG(RPGOptions(mode="logit_signed"), BYTES), text, scores).values()
        assert change == pytest.approx(2 * 0.729 - 2 if logit > 0 else -2 / 0.729 + 2, abs=1e-4) and change < 0


def test_the_end_is_raised_where_the_program_could_end():
    rpg = RPG(RPGOptions(eos_boost=0.8), BYTES)
    assert changed(rpg, "f(1)\nf(2)\n")[chr(EOS)] == pytest.approx(2 * 0.22314, abs=1e-4)  # −2 ln 0.8
    assert chr(EOS) not in changed(rpg, "d = [\n1,\n2,\n") and chr(EOS) not in changed(rpg, "f(1)\ng.x\n")


def test_the_count_grows_until_the_pattern_breaks():
    rpg, text, counts = RPG(RPGOptions(), BYTES), "", []
    for line in [*(f"assert f({i}) == {i}\n" for i in range(5)), "\n", "x = 1\n", "assert f(9) == 9\n"]:
        for character in line:  # a token at a time, as decoding goes
            text += character
            found, critical = rpg.critical(BYTES.encode(text))
        counts.append(found.count if critical else 0)
    assert counts == [0, 2, 3, 4, 5, 5, 0, 0]
    fresh = RPG(RPGOptions(), BYTES)
    for end in range(1, len(text)):
        assert fresh.critical(BYTES.encode(text[:end])) == RPG(RPGOptions(), BYTES).critical(BYTES.encode(text[:end]))


class Words(ByteTokenizer):
    """Tokens of many characters: several terminals in one, or a newline with what begins the next line."""

    words = ["f(", "1", ")", "\nf(", "\n", "x = 1", "\n    f(", "é"[:1]]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def test_tokens_that_hold_a_newline_and_more():
    rpg = RPG(RPGOptions(), Words())
    found, critical = rpg.critical([0, 1, 2, 3, 1, 2])
    assert found.count == 2 and critical == {3}  # the line may end now: only the token that ends it and begins another
    assert rpg.critical([0, 1, 2, 3, 1])[1] == set()
    assert rpg.critical([0, 1, 2, 4, 0, 1, 2, 4])[1] == {0}
    assert rpg.critical([0, 1, 2, 4, 0, 1, 2])[1] == set()
    assert rpg.critical([0, 1, 2, 3, 1, 2, 4])[1] == {0, 3}


def test_halves_of_characters_are_waited_for():
    text = "é(1)\né(2)\n"
    found, critical = RPG(RPGOptions(), BYTES).critical(BYTES.encode(text))
    assert found.count == 2 and critical == {"é".encode()[0]}


def test_a_language_without_its_grammar_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    with pytest.raises(ValueError, match=r"^language=go needs tree-sitter and its grammar: .*riverrun\[code\]"):
        parse_decoding("rpg:language=go")


def test_other_languages_through_tree_sitter():
    pytest.importorskip("tree_sitter_go")
    head = 'package m\nfunc f(x int) string {\n\tif x == 1 {\n\t\treturn "a"\n'
    text = head + "".join(f'\t}} else if x == {i} {{\n\t\treturn "{i}"\n' for i in (2, 3, 4))
    rpg = RPG(RPGOptions(language="go", eos_boost=0.5), BYTES)
    found, critical = rpg.critical(BYTES.encode(text))
    assert found.count == 3 and critical == {ord("}")} and not found.may_end
    assert rpg.critical(BYTES.encode(text[:-2]))[0] is None
    whole, pieces = TreeLines("go"), TreeLines("go")
    whole.feed(text)
    for i in range(0, len(text), 7):
        pieces.feed(text[i : i + 7])
        pieces.unfinished()
    assert pieces.lines == whole.lines and len(whole.lines) == 10


# Contrastive search


@torch.no_grad()
def naive(model, prompt, k, alpha, count):
    """Every candidate read with the whole text before it."""
    tokens = list(prompt)
    for _ in range(count):
        p, candidates = model(torch.tensor([tokens])).logits[0, -1].softmax(-1).topk(k)
        scores = []
        for probability, candidate in zip(p, candidates):
            ids = torch.tensor([[*tokens, int(candidate)]])
            h = model.model(ids, Layout.of_rows(tuple(ids.shape), torch.zeros(1, dtype=torch.long)))[0]
            cosine = torch.nn.functional.cosine_similarity(h[-1:], h[:-1]).max()
            scores.append((1 - alpha) * probability - alpha * cosine)
        tokens.append(int(candidates[int(torch.stack(scores).argmax())]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("window", [5, None])
def test_contrastive_search_equals_reading_everything_again(window):
    model, prompt = exact_hybrid(window), list(b"riverrun, past")
    found = contrastive_search(model, prompt, ContrastiveOptions(k=4, alpha=0.6), max_new_tokens=10, eos_id=None)
    assert found.tokens[0] == naive(model, prompt, 4, 0.6, 10) and found.state_bytes > 0
    greedy = contrastive_search(model, prompt, ContrastiveOptions(alpha=0.0), max_new_tokens=10, eos_id=None).tokens[0]
    assert greedy == naive(model, prompt, 1, 0.0, 10) != found.tokens[0]
    end = found.tokens[0][4]
    cut = contrastive_search(model, prompt, ContrastiveOptions(), max_new_tokens=10, eos_id=end).tokens[0]
    assert cut == found.tokens[0][: found.tokens[0].index(end) + 1]


# Names


def test_specs_are_read():
    greedy, rpg, dry = parse_decodings("greedy, rpg:mode=additive,kappa=2,dry:base=2,range=9")
    assert greedy.spec == "greedy" and rpg.spec == "rpg:mode=additive,kappa=2"
    assert (rpg.options.mode, rpg.options.kappa, dry.options.base, dry.options.range) == ("additive", 2.0, 2.0, 9)
    assert parse_decoding("dry:prompt=false").sees_prompt is False and parse_decoding("dry").sees_prompt


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gredy", "did you mean greedy.*choose from greedy, presence"),
        ("dry:bas=2", "did you mean base.*multiplier, base, allowed_length"),
        ("dry:base", "must look like key=value; keys of dry: multiplier"),
        ("dry:base=x", "dry.base='x'"),
        ("greedy:a=1", "greedy has no options"),
        ("dry:base=0.5", "base ≥ 1"),
        ("lz:window=0", "window ≥ 1"),
        ("rpg:lam=2", "lam ≤ 1"),
        ("rpg:mode=odd", "rpg.mode='odd'"),
        ("contrastive:k=0", "k ≥ 1"),
        ("typical:mass=1", "mass < 1"),
        ("sample:temperature=0", "temperature > 0"),
        ("no_repeat_ngram:size=0", "size ≥ 1"),
        ("repetition:penalty=0", "penalty > 0"),
        ("", "one or several of greedy"),
        ("dry,dry", "each once"),
    ],
)
def test_mistakes_are_value_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_decodings(spec)


# With a model


@pytest.fixture
def loaded(saved):
    found = load_model(saved)
    object.__setattr__(found, "model", exact_hybrid())
    return found


PROMPTS = [list(b"from swerve of shore"), list(b"to bend"), list(b"f(1)\nf(2)\nf(3)\n")]


@torch.no_grad()
def alone(model, decoding, prompt, count, seed=0):
    """By whole forward passes."""
    tokens, processors = list(prompt), LogitsProcessorList(decoding.processors(BYTES, seed))
    for _ in range(count):
        seen = tokens if decoding.sees_prompt else tokens[len(prompt) :]
        scores = model(torch.tensor([tokens])).logits[:, -1].float()
        tokens.append(int(processors(torch.tensor([seen], dtype=torch.long), scores).argmax()))
        if tokens[-1] == EOS:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "spec", ["presence", "no_repeat_ngram:size=2,prompt=false", "dry:prompt=false", "rpg:mode=additive", "sample"]
)
def test_batches_decode_as_alone(loaded, spec):
    decoding = parse_decoding(spec)
    made = decode(loaded, decoding, PROMPTS, 12, seed=3)
    assert made == [alone(loaded.model, decoding, prompt, 12, seed=3) for prompt in PROMPTS]
    if decoding.samples:
        assert made != decode(loaded, decoding, PROMPTS, 12, seed=4)


def test_draws_follow_the_probabilities():
    (draw,) = parse_decoding("sample:temperature=1.0,top_p=1.0").processors(BYTES, 5)[-1:]
    p = torch.tensor([0.5, 0.3, 0.2])
    found = torch.tensor([int(draw.row([i], p.log()).argmax()) for i in range(2000)]).bincount(minlength=3) / 2000
    assert (found - p).abs().max() < 0.04


def test_contrastive_search_is_for_our_models(foreign):
    with pytest.raises(ValueError, match="Riverrun's only"):
        decode(load_model(foreign), parse_decoding("contrastive"), PROMPTS, 2)
