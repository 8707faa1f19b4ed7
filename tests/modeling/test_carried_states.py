"""Training from given states: two chunks are one long sequence, without a gradient across their boundary."""

import pytest
import torch

from riverrun.modeling.layout import Layout
from tests.modeling.test_model import HYBRID, SHAPES, V, assert_close, build, tokens

RECURRENT = [shape for shape in SHAPES if "attention" not in SHAPES[shape].layers]
CUT = 11


def losses(model, ids, targets, states=None, cu_seqlens=None):
    return model(ids, targets=targets, token_losses=True, states=states, cu_seqlens=cu_seqlens)


def empty(model):
    return [{} for _ in model.model.layers]


@pytest.mark.parametrize("shape", RECURRENT)
def test_chunks_are_one_long_forward_and_gradients_stop_between_them(shape):
    model = build(shape, dtype=torch.float64).train()
    ids = tokens(3, 25) % (V // 2)
    ids[:, CUT:] += V // 2  # so that the embeddings tell which chunk a gradient goes to
    ids, targets = ids[:, :-1], ids[:, 1:]
    whole = losses(model, ids, targets)
    first = losses(model, ids[:, :CUT], targets[:, :CUT], empty(model))
    second = losses(model, ids[:, CUT:], targets[:, CUT:], first.states)
    assert_close(torch.cat([first.token_losses, second.token_losses], dim=1), whole.token_losses)
    assert not any(state.requires_grad for layer in first.states + second.states for state in layer.values())
    assert (losses(model, ids[:, CUT:], targets[:, CUT:]).token_losses - second.token_losses).abs().max() > 1e-3

    embedding = model.model.embed_tokens.weight
    if embedding is model.lm_head.weight:
        return
    (across,) = torch.autograd.grad(whole.token_losses[:, CUT:].sum(), embedding, retain_graph=True)
    (within,) = torch.autograd.grad(second.token_losses.sum(), embedding, retain_graph=True)
    early = ids[:, :CUT].unique()
    assert across[early].abs().max() > 0 and within[early].abs().max() == 0

    model.set_recompute(True)
    again = losses(model, ids[:, CUT:], targets[:, CUT:], first.states)
    (recomputed,) = torch.autograd.grad(again.token_losses.sum(), embedding)
    assert torch.equal(recomputed, within)


@pytest.mark.parametrize("shape", RECURRENT)
def test_states_enter_a_rows_first_document_and_leave_its_last(shape):
    model = build(shape, dtype=torch.float64).train()
    ids, targets = tokens(2, 20), tokens(2, 20).roll(1, 1)
    before = losses(model, ids.flip(1), targets, empty(model)).states
    bounds = torch.tensor([0, 7, 12, 20, 40], dtype=torch.int32)  # three documents in the first row, one in the second
    packed = losses(model, ids, targets, before, bounds)
    of_row = [[{k: v[r : r + 1] for k, v in layer.items()} for layer in before] for r in range(2)]
    alone = [
        losses(model, ids[r : r + 1, a:b], targets[r : r + 1, a:b], states)
        for r, a, b, states in (
            (0, 0, 7, of_row[0]),
            (0, 7, 12, empty(model)),
            (0, 12, 20, empty(model)),
            (1, 0, 20, of_row[1]),
        )
    ]
    got = packed.token_losses
    for part, want in zip((got[:1, :7], got[:1, 7:12], got[:1, 12:], got[1:]), alone):
        assert_close(part, want.token_losses)
    for layer, first, second in zip(packed.states, alone[2].states, alone[3].states):
        assert layer.keys() == first.keys()
        for name, state in layer.items():
            assert_close(state, torch.cat([first[name], second[name]]))


def test_attention_keeps_no_states_and_sees_its_row_only():
    model = build("hybrid").train()
    out = losses(model, tokens(2, 16), tokens(2, 16), empty(model))
    assert [bool(layer) for layer in out.states] == [mixer != "attention" for mixer in HYBRID]
    model = build("attention").train()
    ids = tokens(2, 16)
    again = losses(model, ids, ids, losses(model, ids, ids, empty(model)).states)
    assert torch.equal(again.token_losses, losses(model, ids, ids).token_losses)


def test_initial_states_of_a_packed_layout():
    layout = Layout.of_documents((2, 5), torch.tensor([0, 2, 5, 10], dtype=torch.int32))
    states = {"ssd": torch.tensor([[1.0], [2.0]])}
    assert layout.initial(states, "ssd").tolist() == [[1.0], [0.0], [2.0]]
    assert layout.initial(states, "conv") is None and layout.initial(None, "ssd") is None
    rows = Layout.of_rows((2, 5), torch.zeros(2, dtype=torch.int64))
    assert rows.initial(states, "ssd") is states["ssd"]
