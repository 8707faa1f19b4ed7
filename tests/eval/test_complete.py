"""Greedy continuations of several prompts at once, against each alone by whole forward passes."""

import pytest
import torch
from eval_examples import exact_hybrid
from transformers import LogitsProcessor, LogitsProcessorList

from riverrun.eval.decoding import complete as module
from riverrun.eval.decoding.complete import complete, respond
from riverrun.eval.models import load_model
from riverrun.train.data.tokenizer import ByteTokenizer

EOS = ByteTokenizer().eos_id
PROMPTS = [list(b"from swerve of shore"), list(b"to bend"), list(b"of bay, brings us by a")]


@torch.no_grad()
def greedy(model, prompt, count, processors=lambda ids, scores: scores):
    tokens = list(prompt)
    for _ in range(count):
        ids = torch.tensor([tokens])
        tokens.append(int(processors(ids, model(ids).logits[:, -1].float()).argmax()))
        if tokens[-1] == EOS:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


@pytest.fixture(params=["4, windowed", "4", "whole, windowed", "whole"])
def loaded(saved, monkeypatch, request):
    """A small hybrid; the prompt is read in pieces of 4 tokens, or whole."""
    found = load_model(saved)
    object.__setattr__(found, "model", exact_hybrid(5 if "windowed" in request.param else None))
    monkeypatch.setattr(module, "PREFILL_CHUNK", 4 if "4" in request.param else 100)
    return found


def test_batches_of_unequal_prompts_are_continued_as_one_by_one(loaded):
    assert complete(loaded, PROMPTS, 6) == [greedy(loaded.model, prompt, 6) for prompt in PROMPTS]


def test_a_foreign_model_answers_as_alone(foreign):
    loaded = load_model(foreign)
    assert complete(loaded, PROMPTS[:2], 5) == [greedy(loaded.model, prompt, 5) for prompt in PROMPTS[:2]]


class Unseen(LogitsProcessor):
    """Only tokens that the row does not hold."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, float("-inf"))


def test_processors_see_no_padding(loaded):
    made = complete(loaded, PROMPTS, 6, LogitsProcessorList([Unseen()]))
    assert made == [greedy(loaded.model, prompt, 6, Unseen()) for prompt in PROMPTS]
    assert made != complete(loaded, PROMPTS, 6)
    for prompt, row in zip(PROMPTS, made):
        assert len(set(row)) == len(row) and not set(row) & set(prompt)


def test_text_is_continued(loaded):
    texts = ["from swerve of shore", "to bend"]
    expected = [bytes(greedy(loaded.model, list(text.encode()), 6)).decode(errors="replace") for text in texts]
    assert respond(loaded, texts, 6) == expected
