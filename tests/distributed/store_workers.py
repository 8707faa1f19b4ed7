"""Whole runs on a small token store, for tests of what reads the rows in an order or a form of its own."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from training_workers import recipe

from riverrun.train import distributed, loop
from riverrun.train.config import Recipe
from riverrun.train.data.loader import PackedLoader
from riverrun.train.data.store import token_dtype, write_index, write_shard
from riverrun.train.data.tokenizer import ByteTokenizer

SENTENCES = ("A cat sat. ", "It saw a dog. ", "Why? ", "They ran. ", "Nobody knows... ", "Rain fell on it. ")


def write_store(folder: Path, documents: int = 60) -> Path:
    """Bytes of documents of 1 to 20 sentences."""
    rng, tokenizer, items = np.random.default_rng(0), ByteTokenizer(), []
    for _ in range(documents):
        text = "".join(rng.choice(SENTENCES, size=rng.integers(1, 20)))
        items.append((np.array([*tokenizer.encode(text), tokenizer.eos_id]), len(text)))
    folder.mkdir()
    entry = write_shard(folder, "0", items, token_dtype(tokenizer.vocab_size))
    described = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    write_index(folder, [entry], tokenizer=described)
    return folder


def on_store(store: Path, model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """10 steps on 4 rows of 48 bytes, in fp32, saved every 4 steps; a record each."""
    return recipe(
        model={"vocab_size": 320, "layer_pattern": ["mamba2", "para_gru"], **(model or {})},
        data={"seq_len": 48, "train": [{"path": str(store)}], "held_out": None, "tokenizer": "bytes"},
        train={
            "steps": 10, "global_batch_size": 4, "micro_batch_size": 1, "dtype": "fp32", "log_every": 1,
            "eval_every": 0, **train,
        },
    )  # fmt: skip


def train(ranks: distributed.Ranks, config: Recipe, run_dir: Path, kill_at: int = -1) -> None:
    """`loop.run`; the last rank dies when it is asked for the batches of step `kill_at`."""
    step = PackedLoader.step

    def faulty(self: PackedLoader, number: int) -> list[Any]:
        if number == kill_at and ranks.rank == ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)

    PackedLoader.step = faulty  # type: ignore[method-assign]
    outcome = loop.run(config, run_dir, "auto", ranks)
    print(outcome.message)
    sys.exit(outcome.exit_code)
