"""Decoding against full forward passes."""

import pytest
import torch
from eval_examples import hybrid

from riverrun.eval.decoding import generate as decoding
from riverrun.eval.decoding.generate import Sampling, generate
from riverrun.eval.decoding.stream import TextPrinter, continuation
from riverrun.eval.models import load_model
from riverrun.train.data.tokenizer import ByteTokenizer

PROMPT = list(b"riverrun, past Eve and Adam's")


@torch.no_grad()
def likeliest(model, prompt, steps):
    """Greedy decoding by a forward pass over everything for each token."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def greedily(model, prompt, **options):
    return generate(model, prompt, Sampling(greedy=True), **{"max_new_tokens": 12, "eos_id": None, **options})


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:2], PROMPT[:1]])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_greedy_equals_full_forwards(window, prompt, chunk, monkeypatch):
    """However the prompt is read."""
    model = hybrid(window)
    monkeypatch.setattr(decoding.prefill, "__defaults__", (chunk, 0))
    for num_samples in (1, 3):
        result = greedily(model, prompt, num_samples=num_samples)
        assert result.tokens == [likeliest(model, prompt, 12)] * num_samples


def test_foreign_models_decode_too(foreign):
    model = load_model(foreign).model
    result = greedily(model, PROMPT, num_samples=2)
    assert result.tokens == [likeliest(model, PROMPT, 12)] * 2 and result.state_bytes is None


def test_decoding_stops_at_the_end_of_sequence_token():
    model = hybrid()
    free = greedily(model, PROMPT).tokens[0]
    end = free[5]
    expected = free[: free.index(end) + 1]
    for num_samples in (1, 2):
        assert greedily(model, PROMPT, eos_id=end, num_samples=num_samples).tokens == [expected] * num_samples


def test_the_seed_decides():
    model = hybrid()

    def draw(seed, **options):
        return generate(
            model, PROMPT, Sampling(**options), max_new_tokens=30, eos_id=None, num_samples=2, seed=seed
        ).tokens

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are left alone


def test_the_cuts_are_those_asked_for():
    model = hybrid()
    only = greedily(model, PROMPT, max_new_tokens=30).tokens
    for sampling in (Sampling(top_k=1), Sampling(temperature=1e-3, top_p=1.0), Sampling(top_p=1e-6)):
        assert generate(model, PROMPT, sampling, max_new_tokens=30, eos_id=None, seed=3).tokens == only
    logits = model(torch.tensor([PROMPT])).logits[0, -1]
    best = set(logits.topk(4).indices.tolist())
    drawn = generate(model, PROMPT, Sampling(5.0, top_k=4, top_p=1.0), max_new_tokens=1, eos_id=None, num_samples=200)
    assert {tokens[0] for tokens in drawn.tokens} == best


def test_frequencies_are_the_models_probabilities():
    model = hybrid()
    sampling = Sampling(temperature=0.25, top_p=1.0)
    drawn = generate(model, PROMPT, sampling, max_new_tokens=1, eos_id=None, num_samples=4000).tokens
    frequency = torch.bincount(torch.tensor(drawn).flatten(), minlength=258) / 4000
    probability = (model(torch.tensor([PROMPT])).logits[0, -1] / 0.25).softmax(-1)
    assert (frequency - probability).abs().max() < 0.03
    assert probability.max() > 0.1  # so that a wrong temperature would show


def test_state_does_not_grow_with_the_prompt():
    short, long = (greedily(hybrid(), PROMPT * n, max_new_tokens=2).state_bytes for n in (1, 40))
    assert short == long > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "likeliest token use greedy"),
        ({"top_k": 0}, "at least 1"),
        ({"top_p": 0.0}, r"in \(0, 1\]"),
        ({"top_p": 1.1}, r"in \(0, 1\]"),
    ],
)
def test_impossible_sampling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_nothing_to_start_from_is_refused():
    with pytest.raises(ValueError, match="prompt has no tokens"):
        greedily(hybrid(), [])
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        greedily(hybrid(), PROMPT, max_new_tokens=0)


class Recorder:
    def __init__(self):
        self.parts = []

    def write(self, text):
        self.parts.append(text)

    def flush(self):
        pass


def test_text_is_printed_as_it_is_made_by_whole_characters():
    tokenizer, file = ByteTokenizer(), Recorder()
    printer = TextPrinter(tokenizer, PROMPT, file)
    printer.put(torch.tensor([PROMPT]))
    for token in [*"aé\n€b".encode(), tokenizer.eos_id]:
        printer.put(torch.tensor([token]))
    printer.end()
    assert [part for part in file.parts if part] == ["a", "é", "\n", "€", "b"]


def test_the_streamed_text_is_the_generated_one():
    model, tokenizer, file = hybrid(), ByteTokenizer(), Recorder()
    result = greedily(model, PROMPT, streamer=TextPrinter(tokenizer, PROMPT, file), max_new_tokens=40)
    assert "".join(file.parts) == continuation(tokenizer, PROMPT, result.tokens[0]) != ""


def test_special_tokens_are_not_text():
    tokenizer = ByteTokenizer()
    assert continuation(tokenizer, [tokenizer.bos_id, 97], [98, tokenizer.eos_id]) == "b"
