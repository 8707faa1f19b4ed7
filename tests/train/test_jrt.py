"""The objective of JRT-RNN: regions, masks, targets, counts, and the loss by hand."""

import numpy as np
import pytest
import torch

from riverrun.modeling.mixer_options import PrefixLinearAttentionOptions
from riverrun.modeling.options import ModelOptions
from riverrun.train.config import JRTConfig, Recipe
from riverrun.train.data.packing import IGNORED, Row
from riverrun.train.data.tokenizer import ByteTokenizer
from riverrun.train.objectives import make_objective
from riverrun.train.objectives.jrt import JRT, MASKED
from riverrun.train.objectives.objective import Objective

T, M, MASK = 64, 40, 300
CONFIG = JRTConfig(encoder_len=M, mask_id=MASK)


def row(seed: int, starts: tuple[int, ...] = ()) -> Row:
    tokens = np.random.default_rng(seed).integers(0, 250, T + 1)
    targets = tokens[1:].copy()
    targets[np.array(starts, dtype=int) - 1] = IGNORED
    return Row(tokens[:-1], targets, np.array(starts, dtype=np.int64))


def test_masked_tokens_are_targets_in_place_and_the_rest_of_the_encoder_has_none():
    rows, numbers = [row(0), row(1, (10, 50))], [7, 9]
    batch = JRT(CONFIG, 3, None).batch(rows, numbers, 0)
    masked = batch.extra[MASKED]
    assert masked.shape == (2, T) and not masked[:, M:].any() and 0 < masked.sum() < M
    for i, given in enumerate(rows):
        for t in range(T):
            if masked[i, t]:
                assert batch.input_ids[i, t] == MASK and batch.targets[i, t] == given.input_ids[t]
            else:
                assert batch.input_ids[i, t] == given.input_ids[t]
                assert batch.targets[i, t] == (given.targets[t] if t >= M else IGNORED)
    assert batch.targets[0, M - 1] in (IGNORED, rows[0].input_ids[M - 1])  # never the decoder's first token
    assert batch.cu_seqlens.tolist() == [0, T, T + 10, T + 50, 2 * T]


def test_counts_are_those_of_the_paper():
    objective, rows = JRT(CONFIG, 0, None), [row(i) for i in range(64)]
    batches = [objective.batch([r], [i], 0) for i, r in enumerate(rows)]
    of_next, of_masked = map(sum, zip(*map(objective.counts, batches)))
    assert of_next == 64 * (T - M)  # the paper's rows lack their successor: T − M − 1
    mean, spread = 64 * M * 0.15, (64 * M * 0.15 * 0.85) ** 0.5
    assert abs(of_masked - mean) < 4 * spread
    held_out = objective.held_out_batch(rows[:2])
    assert held_out.num_targets == 2 * (T - M) and MASK not in held_out.input_ids
    assert objective.model_inputs(held_out) == {"prefix": M}


def test_masks_depend_on_the_seed_and_the_rows_number_alone():
    def masks(numbers, seed=0, step=0):
        batch = JRT(CONFIG, seed, None).batch([row(n) for n in numbers], numbers, step)
        return batch.extra[MASKED]

    together, apart = masks([4, 5, 6]), torch.cat([masks([5]), masks([4], step=9)])
    assert torch.equal(together[[1, 0]], apart)
    assert not torch.equal(masks([4]), masks([4], seed=1)) and not torch.equal(together[0], together[1])


def test_the_loss_weighs_both_means():
    objective = JRT(CONFIG, 0, None)
    batch = objective.batch([row(0), row(1)], [0, 1], 0)
    token_losses = torch.where(
        batch.targets == IGNORED, 0.0, torch.rand(2, T, generator=torch.Generator().manual_seed(0))
    )
    parts, counts = objective.losses(token_losses, batch), objective.counts(batch)
    got = sum(w * part / n for w, part, n in zip(objective.weights, parts, counts))
    next_token = torch.stack([token_losses[i, t] for i in range(2) for t in range(M, T)]).mean()
    inside = token_losses[:, :M]
    want = (1.0 * next_token + 0.25 * inside.sum() / (inside > 0).sum()) / 1.25
    assert got == pytest.approx(want.item(), rel=1e-6) and objective.needs_token_losses
    assert counts == (2 * (T - M), int((inside > 0).sum()))


def recipe(objective="jrt", encoder=True, vocab_size=320, **jrt) -> Recipe:
    model = {
        "vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2,
        "layer_pattern": ["prefix_linear_attention", "mamba2"],
        "prefix_linear_attention": {"head_dim": 16, "encoder": encoder}, "mamba2": {"head_dim": 16},
    }  # fmt: skip
    given = {"objective": objective, "jrt": {"encoder_len": 32, "mask_id": 300} | jrt}
    return Recipe.model_validate(
        {"model": model, "train": given, "data": {"seq_len": 64, "train": [{"path": "a"}]}}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"objective": "lm"}, "encoder=false, or train.objective='jrt'"),
        ({"objective": "lm", "encoder": False}, None),
        ({"encoder": False}, "needs layers that read a prefix"),
        ({"encoder_len": 64}, "set train.jrt.encoder_len=32"),
        ({"mask_id": None}, "needs train.jrt.mask_id"),
        ({"mask_id": 320}, "set model.vocab_size=384"),
    ],
)
def test_impossible_recipes_are_refused(changes, problem):
    found = recipe(**changes).problems()
    assert len(found) == (problem is not None) and all(problem in text for text in found)


def test_the_mask_is_no_token_of_the_text():
    assert isinstance(make_objective(recipe(), ByteTokenizer()), JRT)
    with pytest.raises(ValueError, match=r"set train\.jrt\.mask_id=2"):
        make_objective(recipe(mask_id=5), ByteTokenizer())
    assert type(make_objective(recipe("lm", False), None)) is Objective


def test_a_model_learns_both(tmp_path):
    """Rows whose second half repeats the first: with the prefix read, both losses fall."""
    from riverrun.modeling.config import RiverrunConfig
    from riverrun.modeling.model import RiverrunForCausalLM

    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, layer_pattern=("prefix_linear_attention",),
        prefix_linear_attention=PrefixLinearAttentionOptions(num_heads=2, head_dim=16, feature_dim=8),
    )  # fmt: skip
    model = RiverrunForCausalLM(RiverrunConfig.from_options(options))
    objective = JRT(JRTConfig(encoder_len=8, mask_id=19), 0, None)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for step in range(60):
        half = np.random.default_rng(step).integers(0, 4, (16, 1)).repeat(8, 1)
        tokens = np.hstack([half, half, half[:, :1]])
        rows = [Row(line[:-1], line[1:], np.array([], dtype=np.int64)) for line in tokens]
        batch = objective.batch(rows, list(range(16 * step, 16 * step + 16)), step)
        out = model(
            batch.input_ids, targets=batch.targets, cu_seqlens=batch.cu_seqlens, token_losses=True,
            **objective.model_inputs(batch),
        )  # fmt: skip
        means = [p / n for p, n in zip(objective.losses(out.token_losses, batch), objective.counts(batch))]
        adam.zero_grad()
        sum(w * mean for w, mean in zip(objective.weights, means)).backward()
        adam.step()
        history.append([mean.item() for mean in means])
    assert max(history[-1]) < 0.3 < min(history[0])
