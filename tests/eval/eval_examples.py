"""Tiny models and texts that the evaluation's tests share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.mixer_options import (
    AttentionOptions,
    GatedDeltaOptions,
    Mamba2Options,
    ParaGRUOptions,
    ParaLSTMOptions,
)
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.train.data.store import token_dtype, write_index, write_shard
from riverrun.train.data.tokenizer import ByteTokenizer

TEXTS = ["Riverrun, past Eve and Adam's,", "x", "from swerve of shore to bend of bay — " * 3, "né à", "brings us " * 9]


def hybrid(window: int | None = 5, tolerance: float = 1e-5) -> RiverrunForCausalLM:
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=5,
        intermediate_size=24,
        layer_pattern=("mamba2", "gated_delta", "para_gru", "para_lstm", "attention"),
        initializer_range=0.2,
        attention=AttentionOptions(num_heads=2, num_kv_heads=1, head_dim=4, window=window),
        mamba2=Mamba2Options(head_dim=8, state_size=6, chunk_size=8),
        gated_delta=GatedDeltaOptions(num_heads=2, head_dim=4, chunk_size=8),
        para_gru=ParaGRUOptions(num_heads=2, tolerance=tolerance),
        para_lstm=ParaLSTMOptions(num_heads=2, tolerance=tolerance),
    )
    return RiverrunForCausalLM(RiverrunConfig.from_options(options)).eval()


def exact_hybrid(window: int | None = 5) -> RiverrunForCausalLM:
    """In float64, down to its rounding."""
    return hybrid(window, 1e-12).double()


def encoded(texts: list[str] = TEXTS) -> list[list[int]]:
    return [[*ByteTokenizer().encode(text), ByteTokenizer.eos_id] for text in texts]


def write_store(folder: Path, texts: list[str] = TEXTS, fingerprint: str = ByteTokenizer.fingerprint) -> Path:
    folder.mkdir()
    documents = [(np.array(tokens), len(text.encode())) for tokens, text in zip(encoded(texts), texts)]
    shard = write_shard(folder, "00000", documents, token_dtype(ByteTokenizer.vocab_size))
    description = {"fingerprint": fingerprint, "vocab_size": ByteTokenizer.vocab_size, "eos_id": ByteTokenizer.eos_id}
    write_index(folder, [shard], tokenizer=description)
    return folder


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
