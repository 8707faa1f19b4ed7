"""Tiny models whose weights are all random, so that no swapped or forgotten tensor goes unnoticed."""

import math
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerFast

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.memory_options import MEMORY_OPTIONS
from riverrun.modeling.mixer_options import (
    OPTIONS,
    AttentionOptions,
    ElmanOptions,
    GatedDeltaOptions,
    GRUOptions,
    LSTMOptions,
    Mamba2Options,
    SLSTMOptions,
)
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions

VOCAB = 64


def randomised(options: ModelOptions) -> RiverrunForCausalLM:
    """A model with large random matrices, and norms, decays and biases away from their initial values."""
    model = RiverrunForCausalLM(RiverrunConfig.from_options(options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif p.dim() == 1:  # A_log, dt_bias, D, biases
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / math.sqrt(p.shape[-1]))
    return model


def mamba2(groups: int = 1, tied: bool = False, **mixer) -> ModelOptions:
    return ModelOptions(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        layer_pattern=("mamba2",),
        intermediate_size=0,
        tie_word_embeddings=tied,
        norm_eps=1e-4,
        mamba2=Mamba2Options(
            **{"head_dim": 8, "state_size": 16, "num_groups": groups, "norm_eps": 1e-4, "chunk_size": 16} | mixer
        ),
    )


def olmo(rope: bool = True, neg_eigval: bool = True, tied: bool = False, head_dim: int = 8) -> ModelOptions:
    return ModelOptions(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=5,
        layer_pattern=("gated_delta", "gated_delta", "attention"),
        intermediate_size=48,
        tie_word_embeddings=tied,
        norm_eps=1e-4,
        post_norm_attention=True,
        attention=AttentionOptions(
            num_heads=4,
            num_kv_heads=2,
            head_dim=head_dim,
            rope=rope,
            rope_theta=500.0 if rope else 10_000.0,
            qk_norm="full",
        ),
        gated_delta=GatedDeltaOptions(
            num_heads=2, head_dim=8, expand_v=1.5, allow_neg_eigval=neg_eigval, conv_kernel=3
        ),
    )


def hybrid() -> ModelOptions:
    """All mixers; attention once full and once in a window would need two configs, so in a window."""
    memory = {"num_heads": 2, "head_dim": 8, "gate_rank": 4, "keep_states": "all"}
    return ModelOptions(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=len(OPTIONS),
        layer_pattern=tuple(OPTIONS),
        attention=AttentionOptions(num_heads=4, num_kv_heads=2, head_dim=8, window=5, qk_norm="head"),
        mamba2=Mamba2Options(head_dim=8, state_size=8, num_groups=2),
        gated_delta=GatedDeltaOptions(num_heads=2, head_dim=8, num_householder=2),
        slstm=SLSTMOptions(head_dim=16, recurrent_init=1.0),
        lstm=LSTMOptions(head_dim=16),
        gru=GRUOptions(head_dim=16),
        elman=ElmanOptions(head_dim=16),
        **{name: options(**memory) for name, options in MEMORY_OPTIONS.items()},
    )


def with_options(options: ModelOptions, mixer: str, **changes) -> ModelOptions:
    return replace(options, **{mixer: replace(getattr(options, mixer), **changes)})


def save_tokenizer(folder, vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A word-level tokenizer `w0 w1 …` with bos, eos and pad."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    fast.save_pretrained(folder)
    return fast
