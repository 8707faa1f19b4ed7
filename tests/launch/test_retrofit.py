"""`riverrun retrofit`: what it writes, tells and refuses, and that training goes on from it."""

import math
import sys
import tomllib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import store_workers
import training_workers as workers

from riverrun.eval.decoding.generate import Sampling, generate
from riverrun.eval.models import load_model
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.hf.export import export_model
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.train import checkpoint, metrics
from riverrun.train.data.store import TokenStore
from riverrun.train.data.tokenizer import ByteTokenizer
from tests.launch.test_cli import invoke

MODEL = {"num_hidden_layers": 5, "layer_pattern": ["attention", "mamba2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("retrofit")


@pytest.fixture(scope="module")
def store(folder):
    return store_workers.write_store(folder / "store")


@pytest.fixture(scope="module")
def whole(folder, store):
    """The export of a model of fixed depth that has learned what letters there are."""
    torch.manual_seed(0)
    model = RiverrunForCausalLM(RiverrunConfig.from_options(store_workers.on_store(store, model=MODEL).model))
    tokens = TokenStore.open(store)
    rows = torch.from_numpy(tokens.tokens(0, tokens.num_tokens // 49 * 49).astype("int64")).view(-1, 49)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in rows[:240].split(8):
        optimizer.zero_grad()
        model(batch[:, :-1], targets=batch[:, 1:].contiguous()).loss.backward()
        optimizer.step()
    ByteTokenizer().save(folder / "tokenizer")
    export_model(model.config, model.state_dict(), folder / "whole", tokenizer_dir=folder / "tokenizer")
    return folder / "whole"


def retrofit(model, out, *arguments):
    result = invoke("retrofit", str(model), "--out", str(out), *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_training_goes_on_from_it(folder, store, whole):
    out = folder / "recurrent"
    shown = retrofit(whole, out, "--prelude", "0", "--core", "1-3", "--coda", "4", "--data", str(store),
                     "--mean-recurrence", "3", "--backprop-depth", "2")  # fmt: skip
    assert "1 layers of prelude, 3 of core, 1 of coda; 11 are run with 3 iterations" in shown
    assert "dropped layers: none" in shown
    recipe = tomllib.loads(shown.partition("recipe:")[2])
    depth = recipe["model"]["depth"]
    std = depth.pop("state_std")
    assert recipe["train"] == {"init_from": str(out)} and recipe["model"]["num_hidden_layers"] == 5
    assert depth == {"prelude_layers": 1, "coda_layers": 1, "mean_recurrence": 3, "backprop_depth": 2,
                     "norm_core": False}  # fmt: skip
    assert 0.001 < std < 1 and std != 0.4**0.5

    before, new = load_model(whole, device="cpu"), load_model(out, device="cpu")
    assert new.model.config.options.depth.state_std == std
    assert new.require_tokenizer().fingerprint == before.require_tokenizer().fingerprint
    ids = torch.randint(0, 258, (2, 20))
    assert torch.equal(new.model(ids, num_steps=3).logits, before.model(ids).logits)
    greedy = Sampling(greedy=True)
    texts = [generate(m.model, ids[0].tolist(), greedy, max_new_tokens=6, eos_id=None).tokens for m in (before, new)]
    assert texts[0] == texts[1] and len(texts[0][0]) == 6

    model = MODEL | {"depth": recipe["model"]["depth"] | {"state_std": std}}
    run, log = folder / "run", folder / "run.log"
    config = store_workers.on_store(store, model=model, steps=8, init_from=str(out))
    codes = workers.run(store_workers.train, config, run, -1, log=log)
    assert not any(codes) and f"from the weights of {out}" in workers.read(log), workers.read(log)
    losses = [record["loss"] for record in metrics.read(run / "metrics.jsonl")]
    assert losses[0] < 0.7 * math.log(258), "it starts anew"
    assert sum(losses[4:]) < sum(losses[:4])
    adapter = checkpoint.load_weights(run)["model.core.injection.weight"]
    assert adapter[:, :32].abs().max() > 0, "the state is not used"
    again = invoke("retrofit", str(run), "--out", str(folder / "again"), "--core", "2")
    assert again.exit_code == 2 and "runs layers several times already" in again.stderr


def test_some_layers_without_a_store(folder, whole):
    shown = retrofit(whole, folder / "some", "--core", "2", "--coda", "4")
    assert "0 layers of prelude, 1 of core, 1 of coda; 9 are run with 8 iterations" in shown
    assert "dropped layers: 0, 1, 3" in shown and 'layer_pattern = ["attention"]' in shown
    assert "0.6325, Huginn's; --data STORE calibrates it" in shown
    weights = load_model(folder / "some", device="cpu").model.state_dict()
    old = load_model(whole, device="cpu").model.state_dict()
    for new, number in (("model.core.layers.0.", 2), ("model.coda.0.", 4)):
        theirs = {name.removeprefix(f"model.layers.{number}."): tensor for name, tensor in old.items()
                  if name.startswith(f"model.layers.{number}.")}  # fmt: skip
        assert len(theirs) > 5 and all(torch.equal(weights[new + name], theirs[name]) for name in theirs)


def test_mistakes_are_told(folder, store, whole):
    def refused(*arguments, model=whole, out="new"):
        result = invoke("retrofit", str(model), "--out", str(folder / out), *arguments)
        assert result.exit_code == 2 and not (folder / "new").exists()
        return result.stderr

    assert "the core 1-7 goes beyond the model's layers, 0 to 4" in refused("--core", "1-7")
    assert f"MODEL={folder} has no weights: name a run folder" in refused("--core", "1", model=folder)
    assert "exists already" in refused("--core", "1", out="whole")
    assert "mean_recurrence=0 must be at least 1 iteration" in refused("--core", "1", "--mean-recurrence", "0")
    assert "is not a token store" in refused("--core", "1", "--data", str(whole))
    index = (store / "index.json").read_text()
    other = folder / "other"
    other.mkdir()
    for path in store.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "index.json").write_text(index.replace('"fingerprint": "', '"fingerprint": "0'))
    assert "prepared with another tokenizer" in refused("--core", "1", "--data", str(other))
