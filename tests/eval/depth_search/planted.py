"""A model whose answer is a known function of the chain of layers that runs."""

from types import SimpleNamespace

import torch
from torch import nn

from riverrun.eval.depth_search.chains import neighbours
from riverrun.eval.depth_search.questions import Question
from riverrun.eval.models import LoadedModel
from riverrun.train.data.tokenizer import ByteTokenizer

QUESTION = Question("Which?", ("yes", "not"), ("A", "B"), 0)


class Digit(nn.Module):
    """Appends its number, from 1 on, to the hidden state, a number to some base."""

    def __init__(self, number, base):
        super().__init__()
        self.number, self.base = number, base

    def forward(self, hidden):
        return hidden * self.base + self.number + 1


class Planted(nn.Module):
    """Prefers "yes" to "not" after the chains for which `is_right`; counts how many rows each layer has read."""

    def __init__(self, num_layers, is_right):
        super().__init__()
        self.base, self.is_right = num_layers + 1, is_right
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=num_layers))
        self.embedding = nn.Embedding(ByteTokenizer.vocab_size, 1)
        self.layers = nn.ModuleList(Digit(i, self.base) for i in range(num_layers))

    def get_input_embeddings(self):
        return self.embedding

    def chain(self, code):
        found = []
        while code:
            code, digit = divmod(code, self.base)
            found.append(digit - 1)
        return tuple(reversed(found))

    def forward(self, ids, use_cache=False):
        hidden = torch.zeros(*ids.shape, 1, dtype=torch.int64)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = torch.zeros(*ids.shape, ByteTokenizer.vocab_size)
        for row, code in enumerate(hidden[:, -1, 0].tolist()):
            letter = "y" if self.is_right(self.chain(code)) else "n"
            logits[row, :, ord(letter)] = 1
        return SimpleNamespace(logits=logits)


def loaded(network) -> LoadedModel:
    return LoadedModel("planted", network, ByteTokenizer(), "a planted model", "0" * 64)


def all_chains(space):
    """Every chain that edits lead to."""
    found, new = {space.identity}, [space.identity]
    while new:
        reached = {chain for old in new for part in neighbours(space, old) for chain in part} - found
        found |= reached
        new = list(reached)
    return found
