"""DITTO's pseudo-repetitions and their loss, against rows and probabilities written out by hand."""

import math

import numpy as np
import pytest
import torch

from riverrun.train.config import DittoConfig
from riverrun.train.data.packing import IGNORED, Row, collate
from riverrun.train.data.tokenizer import ByteTokenizer
from riverrun.train.objectives.ditto import PERIOD, Ditto, delimiter_ids, sentences

DOT = 9


def row(*tokens, starts=()):
    ids = np.array(tokens)
    targets = np.append(ids[1:], 0)
    targets[np.array(starts, int) - 1] = IGNORED
    return Row(ids, targets, np.array(starts, int))


def ditto(probability=1.0, decay=0.5, seed=0):
    return Ditto(DittoConfig(probability=probability, decay=decay), [DOT], seed)


def found(row):
    return [(row.input_ids[a:b].tolist(), row.input_ids[b:c].tolist()) for a, b, c in sentences(row, np.array([DOT]))]


def test_interior_sentences_lie_between_two_delimiters_of_one_document():
    assert found(row(1, 2, DOT, 3, DOT, 4, 5, DOT, 6, 7, 8)) == [
        ([1, 2, DOT], [3, DOT]),
        ([3, DOT], [4, 5, DOT]),
    ]
    assert found(row(1, 2, DOT, 3, 4, DOT, 6, 7, starts=[4])) == []
    assert found(row(0, 0, 1, DOT, 3, DOT, 6, 7, starts=[2])) == [([1, DOT], [3, DOT])]
    assert found(row(1, DOT, DOT, DOT, 2, DOT, 0, 0)) == [([1, DOT, DOT, DOT], [2, DOT])]
    assert found(row(1, 2, 3, 4, DOT)) == found(row(1, 2, 3, 4, 5)) == []
    assert found(row(1, DOT, 2, 2, 2, 2, DOT, 3)) == [], "not twice in the row"


def test_a_row_is_the_sentence_before_and_copies_to_its_end():
    rows = [row(1, 2, DOT, 3, DOT, 5, 6, 7, 8, 0, 0), row(1, 2, 3, 4, 5, 6, 7, 8, DOT, 0, 0)]
    batch = ditto().batch(rows, [0, 1], step=0)
    assert batch.input_ids[0].tolist() == [1, 2, DOT, 3, DOT, 3, DOT, 3, DOT, 3, DOT]
    assert batch.targets[0].tolist() == [2, DOT, 3, DOT, 3, DOT, 3, DOT, 3, DOT, 3]
    assert batch.extra[PERIOD][0].tolist() == [0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2]
    assert batch.cu_seqlens.tolist() == [0, 11, 22]
    assert batch.input_ids[1].tolist() == rows[1].input_ids.tolist(), "without two delimiters it is left out"
    assert (batch.targets[1] == IGNORED).all() and not batch.extra[PERIOD][1].any()
    objective = ditto()
    assert objective.counts(batch) == (0, 7, 2)
    losses = objective.losses(torch.zeros(2, 11), batch)
    assert losses[0] == 0 and losses[2] == 1


def test_the_loss_by_hand():
    objective = ditto(decay=0.5)
    batch = objective.batch([row(1, DOT, 3, DOT, 5, 6, 7)], [0], step=0)
    assert batch.input_ids[0].tolist() == [1, DOT, 3, DOT, 3, DOT, 3]  # copies from place 2 on, counted from place 4 on
    p = torch.tensor([[0.7, 0.8, 0.6, 0.4, 0.5, 0.1, 0.25]])
    _, loss, _ = objective.losses(-p.log(), batch)
    # targets 3..6 are tokens 3 . 3 of the copies after the first: 0.4 after 0.8, 0.5 after 0.6, 0.1 after 0.4, 0.25
    # after 0.5
    want = -sum(math.log(1 - abs(a - 0.5 * b)) for a, b in ((0.4, 0.8), (0.5, 0.6), (0.1, 0.4), (0.25, 0.5)))
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_probabilities_that_decay_cost_nothing_and_only_the_later_copy_has_a_gradient():
    objective = ditto(decay=0.5)
    batch = objective.batch([row(1, DOT, 3, DOT, 5, 6, 7)], [0], step=0)
    p = torch.tensor([[0.7, 0.8, 0.6, 0.4, 0.3, 0.2, 0.15]], dtype=torch.float64)
    assert objective.losses(-p.log(), batch)[1].item() == pytest.approx(0, abs=1e-12)
    p = torch.tensor([[0.7, 0.8, 0.6, 0.4, 0.5, 0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    objective.losses(-p.log(), batch)[1].backward()
    # of −log(1 − |p_n − λ p_{n−1}|) by p_n alone: 0.4 is at the kink; nothing through p_{n−1}
    want = [0, 0, 0, 0, 1 / (1 - 0.2), 1 / (1 - 0.1), 1 / (1 - 0.15)]
    assert p.grad[0].tolist() == pytest.approx(want)


def test_a_probability_of_one_stays_finite():
    objective = Ditto(DittoConfig(probability=1.0, decay=0.0), [DOT], 0)
    batch = objective.batch([row(1, DOT, 3, DOT, 5, 6, 7)], [0], step=0)
    losses = torch.zeros(1, 7, requires_grad=True)
    loss = objective.losses(losses, batch)[1]
    loss.backward()
    assert loss.item() == pytest.approx(-4 * math.log(1e-20), rel=1e-5) and losses.grad.isfinite().all()


def test_steps_are_of_one_kind_and_the_sentence_follows_from_the_row():
    objective = ditto(probability=0.5, seed=3)
    kinds = [objective.repeats(step) for step in range(400)]
    assert kinds == [ditto(probability=0.5, seed=3).repeats(step) for step in range(400)]
    assert kinds != [ditto(probability=0.5, seed=4).repeats(step) for step in range(400)]
    assert 160 < sum(kinds) < 240 and all(ditto().repeats(step) for step in range(9))
    long = row(*[1, DOT, 2, DOT, 3, DOT, 4, DOT, 5, DOT] * 4)
    plain, repeating = kinds.index(False), kinds.index(True)
    batch = objective.batch([long, long], [0, 1], plain)
    want = collate([long, long])
    assert torch.equal(batch.input_ids, want.input_ids) and torch.equal(batch.targets, want.targets)
    assert objective.counts(batch) == (want.num_targets, 0, 0)
    losses = torch.rand(batch.targets.shape)
    assert objective.losses(losses, batch)[0] == losses.sum() and objective.losses(losses, batch)[1] == 0
    drawn = [objective.batch([long], [number], repeating).input_ids for number in range(20)]
    assert len({tuple(ids[0].tolist()) for ids in drawn}) > 3
    together = objective.batch([long] * 20, range(20), kinds.index(True, repeating + 1))
    assert torch.equal(together.input_ids, torch.cat(drawn)), "whatever the micro batch and the step"


def test_delimiters_are_looked_up_in_the_vocabulary():
    class Pieces(ByteTokenizer):
        pieces = ("a", ".", " .", ".\n", "..", "!", " !")
        vocab_size = len(pieces)

        def decode(self, ids):
            return "".join(self.pieces[i] for i in ids)

    assert delimiter_ids(DittoConfig(), ByteTokenizer()) == [ord(".")]
    assert delimiter_ids(DittoConfig(), Pieces()) == [1, 2]
    assert delimiter_ids(DittoConfig(delimiters=["!", ".\n"]), Pieces()) == [3, 5, 6]
    assert delimiter_ids(DittoConfig(delimiter_ids=[7]), None) == [7]
    with pytest.raises(ValueError, match=r"name data\.tokenizer, or give their ids in train\.ditto\.delimiter_ids"):
        delimiter_ids(DittoConfig(), None)
    with pytest.raises(ValueError, match="no token ends sentences"):
        delimiter_ids(DittoConfig(delimiters=["?"]), Pieces())
