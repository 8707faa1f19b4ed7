"""Folders that the evaluation's tests share; makes the helper module importable under pytest's importlib mode."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from eval_examples import hybrid, write_store

from riverrun.train.data.tokenizer import ByteTokenizer


@pytest.fixture
def store(tmp_path) -> Path:
    return write_store(tmp_path / "store")


@pytest.fixture
def saved(tmp_path) -> Path:
    """A model folder with its tokenizer."""
    folder = tmp_path / "model"
    hybrid().save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A tiny Llama with the byte tokenizer: a model that is not Riverrun's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path / "foreign"
    LlamaForCausalLM(config).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder
