"""Evaluations of models whose layers run several times: streamed as at once, and refused where they make no sense."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from riverrun.eval.batches import pad
from riverrun.eval.decoding.complete import complete
from riverrun.eval.decoding.contrastive import ContrastiveOptions, contrastive_search
from riverrun.eval.decoding.generate import Sampling, generate
from riverrun.eval.depth_search.models import Layers
from riverrun.eval.lm_eval import RiverrunLM
from riverrun.eval.losses import token_losses
from riverrun.eval.models import LoadedModel
from riverrun.eval.repetition.predictions import predict
from riverrun.eval.tasks import state_statistics
from riverrun.eval.tasks.perplexity import Losses, measure_streaming
from riverrun.modeling.depth.universal_options import UniversalOptions
from riverrun.modeling.hf.export import export_model
from riverrun.train.data.tokenizer import ByteTokenizer
from tests.modeling.depth.shapes import HUGINN, SHAPES, build

LOOPED = {
    "core of gated_delta": replace(SHAPES["gated_delta"], vocab_size=258),
    "universal": replace(
        HUGINN, depth=None, sandwich_norm=False, vocab_size=258, num_hidden_layers=1,
        universal=UniversalOptions(max_steps=3),
    ),
}  # fmt: skip
ROWS = [np.random.default_rng(i).integers(0, 256, n) for i, n in enumerate((30, 17, 9))]


@pytest.fixture(params=LOOPED)
def loaded(request) -> LoadedModel:
    return LoadedModel("tiny", build(LOOPED[request.param]), ByteTokenizer(), "a looped model", "0" * 64)


@torch.no_grad()
def whole(model, row) -> np.ndarray:
    """The losses of a row, from one forward pass."""
    ids = torch.tensor(row)[None]
    return F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none").numpy()


class Kept(Losses):
    def __init__(self) -> None:
        self.losses: dict[tuple[int, int], float] = {}

    def add(self, losses: np.ndarray, positions: np.ndarray, numbers: np.ndarray) -> None:
        for loss, position, number in zip(losses, positions, numbers, strict=True):
            self.losses[int(number), int(position)] = float(loss)


@torch.no_grad()
def test_losses_of_streams_and_of_packed_rows(loaded):
    model, expected = loaded.model, [whole(loaded.model, row) for row in ROWS]
    kept = Kept()
    measure_streaming(model, ROWS, kept, chunk_len=7, batch_size=2)
    for number, losses in enumerate(expected):
        got = [kept.losses[number, position] for position in range(1, len(losses) + 1)]
        np.testing.assert_allclose(got, losses, rtol=1e-8)
    ids, targets = pad([(row[:-1], row[1:]) for row in ROWS], 29)
    for row, losses in zip(token_losses(model, ids, targets), expected):
        np.testing.assert_allclose(row[: len(losses)], losses, rtol=1e-8)
    for predicted, losses in zip(predict(loaded, [row.tolist() for row in ROWS]), expected):
        np.testing.assert_allclose(-predicted.log_p, losses, rtol=1e-8)


def test_greedy_decoding_of_all_kinds_takes_the_likeliest_token(loaded):
    model, prompt, expected = loaded.model, ROWS[1].tolist(), []
    with torch.no_grad():
        for _ in range(4):
            expected.append(int(model(torch.tensor([prompt + expected])).logits[0, -1].argmax()))
    assert generate(model, prompt, Sampling(greedy=True), max_new_tokens=4, eos_id=None).tokens == [expected]
    found = contrastive_search(model, prompt, ContrastiveOptions(k=2, alpha=0.0), max_new_tokens=4, eos_id=None)
    assert found.tokens == [expected]
    assert complete(loaded, [prompt, prompt[3:]], max_new_tokens=4)[0] == expected


def test_lm_eval_scores(loaded, tmp_path):
    export_model(loaded.model.config, loaded.model.state_dict(), tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    lm = RiverrunLM(str(tmp_path / "model"))
    row = ROWS[0].tolist()
    ((score, _),) = lm._loglikelihood_tokens([(("", ""), row[:10], row[10:])])
    assert score == pytest.approx(-whole(loaded.model, row)[9:].sum(), rel=1e-8)
    assert lm._stream(row) == pytest.approx(-whole(loaded.model, row).sum(), rel=1e-8)


def test_what_is_of_layers_that_run_once_is_refused(loaded):
    with pytest.raises(ValueError, match="--states 0 leaves a looped model's states out"):
        state_statistics.measure(loaded.model, ROWS, train_length=None, chunk_len=8)
    with pytest.raises(ValueError, match="chains are made of models of fixed depth"):
        Layers(loaded)
