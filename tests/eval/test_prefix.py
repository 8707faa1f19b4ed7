"""Prompts that are read as a prefix: many at a time, one for several samples, and in pieces."""

import pytest
import torch

from riverrun.eval.decoding import complete as completing
from riverrun.eval.decoding import generate as generating
from riverrun.eval.decoding.complete import complete
from riverrun.eval.decoding.generate import Sampling, generate
from riverrun.eval.models import LoadedModel
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.mixer_options import AttentionOptions, PrefixLinearAttentionOptions
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.train.data.tokenizer import ByteTokenizer

NEW = 6
PROMPTS = [list(b"Riverrun, past Eve and Adam's, from swerve of shore"), list(b"to bend of bay"), list(b"brings us by")]


@pytest.fixture(scope="module")
def model() -> RiverrunForCausalLM:
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=16, num_hidden_layers=2, intermediate_size=24,
        initializer_range=0.4, layer_pattern=("prefix_linear_attention", "attention"),
        prefix_linear_attention=PrefixLinearAttentionOptions(num_heads=2, head_dim=8, feature_dim=4, chunk_size=8),
        attention=AttentionOptions(num_heads=2, head_dim=8, window=9),
    )  # fmt: skip
    return RiverrunForCausalLM(RiverrunConfig.from_options(options)).double().eval()


@torch.no_grad()
def greedy(model: RiverrunForCausalLM, prompt: list[int], prefix: int) -> list[int]:
    """By whole forward passes."""
    tokens = list(prompt)
    for _ in range(NEW):
        logits = model(torch.tensor([tokens]), prefix=min(prefix, len(prompt))).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prefix", [1, 11, 13, 40, 1000])
@pytest.mark.parametrize("chunk", [4, 4096])
def test_batches_and_single_prompts_equal_whole_forward_passes(model, prefix, chunk, monkeypatch):
    monkeypatch.setattr(completing, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(generating, "PREFILL_CHUNK", chunk)
    want = [greedy(model, prompt, prefix) for prompt in PROMPTS]
    assert want != [greedy(model, prompt, 0) for prompt in PROMPTS]
    loaded = LoadedModel("tiny", model, ByteTokenizer(), "tiny", "0")
    assert ByteTokenizer.eos_id not in [token for made in want for token in made]
    assert complete(loaded, PROMPTS, NEW, prefix=prefix) == want
    for prompt, tokens in zip(PROMPTS, want):
        made = generate(
            model, prompt, Sampling(greedy=True), max_new_tokens=NEW, eos_id=None, num_samples=2, prefix=prefix
        )
        assert made.tokens == [tokens, tokens] and made.state_bytes


def test_models_that_read_no_prefix_say_so(model):
    with pytest.raises(ValueError, match="must not be negative"):
        generate(model, [1, 2], Sampling(), max_new_tokens=1, eos_id=None, prefix=-1)
    options = ModelOptions(vocab_size=9, hidden_size=16, num_hidden_layers=1, layer_pattern=("attention",))
    other = RiverrunForCausalLM(RiverrunConfig.from_options(options))
    with pytest.raises(ValueError, match="leave the prefix out"):
        generate(other, [1, 2], Sampling(), max_new_tokens=1, eos_id=None, prefix=1)
