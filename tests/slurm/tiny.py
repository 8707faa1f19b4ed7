"""A recipe and a token store small enough to train for a second, for tests that start real processes."""

from pathlib import Path

import numpy as np

from riverrun.train.data.store import token_dtype, write_index, write_shard

RECIPE = """\
name = "tiny"

[model]
vocab_size = 64
hidden_size = 16
num_hidden_layers = 1
layer_pattern = ["mamba2"]

[model.mamba2]
head_dim = 16
state_size = 8
chunk_size = 8

[data]
seq_len = 16
train = [{{ path = "{store}" }}]

[train]
steps = 160
global_batch_size = 4
micro_batch_size = 1
dtype = "fp32"
log_every = 1
eval_every = 0

[engine]
device = "cpu"

[optimizer]
lr = 1e-2

[schedule]
warmup_steps = 2

[checkpoint]
every = 8
keep = 3

[log]
tensorboard = false
"""


def write(folder: Path) -> Path:
    """Writes the store beside the recipe, whose path is returned."""
    store = folder / "store"
    store.mkdir(parents=True)
    generator = np.random.default_rng(0)
    documents = [(np.append((generator.integers(64) + np.arange(99)) % 63, 63), 400) for _ in range(60)]
    tokenizer = {"fingerprint": "synthetic", "vocab_size": 64, "eos_id": 63}
    entry = write_shard(store, "00000", documents, token_dtype(64))
    write_index(store, [entry], tokenizer=tokenizer)
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.format(store=store))
    return recipe
