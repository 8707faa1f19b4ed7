"""Whether a model gives the right answer to a question when a chain of its units runs.

By likelihood: the choice whose tokens after the prompt have the largest log-likelihood per character must be the right
one; a tie is wrong. The choices are the rows of one batch. Chains of one question share prefixes, whose hidden states
are kept, and different chains run together: those whose next unit is the same are one batch of it. Rounding differs
with the rows of a batch, hence `alone`.

By generation: greedy, up to the first newline, of one chain after the other.

Costs are forward passes of one unit: over all choices of a question, or over the tokens that are read at a time.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict

import torch
from torch.nn import functional as F

from riverrun.eval.decoding.complete import opening
from riverrun.eval.decoding.stream import continuation
from riverrun.eval.depth_search.chains import Chain
from riverrun.eval.depth_search.questions import Question
from riverrun.eval.depth_search.units import Units
from riverrun.eval.models import LoadedModel
from riverrun.train.data.packing import IGNORED

CACHE_BYTES = 2**30  # of hidden states of prefixes


class Answer(ABC):
    """A question put to a model. `passes` counts the forward passes of a unit so far."""

    passes = 0

    @abstractmethod
    def right(self, chains: list[Chain]) -> list[bool]:
        """Whether each chain answers right."""

    @abstractmethod
    def alone(self, chain: Chain) -> bool:
        """The same of one chain, all of it computed, and nothing else in its batches."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Of the longest row that the model may be given."""


class Likelihood(Answer):
    """
    Args:
        cache_bytes: of prefixes that are kept, the ones used last; besides those of the chains that run.
    """

    def __init__(self, model: LoadedModel, units: Units, question: Question, cache_bytes: int = CACHE_BYTES):
        tokenizer, begin = model.require_tokenizer(), opening(model)
        prompt = begin + tokenizer.encode(question.prompt)
        rows = [begin + tokenizer.encode(f"{question.prompt} {choice}") for choice in question.choices]
        # a tokenizer may join the end of the prompt and the beginning of a choice
        shared = min(_common(prompt, row) for row in rows)
        assert shared >= 1
        width = max(map(len, rows))
        self.units, self.answer = units, question.answer
        self.ids = torch.zeros(len(rows), width - 1, dtype=torch.long)  # (B, T), the last token is only predicted
        self.targets = torch.full((len(rows), width - shared), IGNORED)  # of the last tokens
        for i, row in enumerate(rows):
            self.ids[i, : len(row[:-1])] = torch.tensor(row[:-1])
            self.targets[i, : len(row) - shared] = torch.tensor(row[shared:])
        self.ids, self.targets = self.ids.to(model.device), self.targets.to(model.device)
        self.characters = torch.tensor([len(choice) for choice in question.choices], dtype=torch.float64)
        self.kept, self.kept_bytes, self.cache_bytes = OrderedDict[Chain, torch.Tensor](), 0, cache_bytes

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[1]

    def right(self, chains: list[Chain]) -> list[bool]:
        return [self._is_right(scores) for scores in self.scores(chains)]

    def alone(self, chain: Chain) -> bool:
        self.passes += len(chain)
        return self._is_right(self._scores(self.units.run(chain, self.ids, self.targets.shape[1]))[0])

    def _is_right(self, scores: torch.Tensor) -> bool:
        others = torch.cat([scores[: self.answer], scores[self.answer + 1 :]])
        return bool((scores[self.answer] > others).all())

    def scores(self, chains: list[Chain]) -> torch.Tensor:
        """(chains, B) log-likelihoods per character, float64."""
        hidden, ids = torch.cat(self._hidden(chains)), self.ids.repeat(len(chains), 1)
        return self._scores(self.units.logits(hidden, ids, self.targets.shape[1]))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(n·B, S, V) → (n, B)"""
        targets = self.targets.repeat(len(logits) // len(self.ids), 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return -losses.view(-1, *self.targets.shape).double().sum(-1).cpu() / self.characters

    def _hidden(self, chains: list[Chain]) -> list[torch.Tensor]:
        """(B, T, …) after each chain."""
        starts = {1: self.units.start(self.ids)}  # by chains that run together
        have: dict[Chain, torch.Tensor] = {(): starts[1].hidden}
        missing: dict[Chain, None] = {}
        for chain in chains:
            known = next(n for n in range(len(chain), -1, -1) if n == 0 or chain[:n] in self.kept)
            if known:
                self.kept.move_to_end(chain[:known])
                have[chain[:known]] = self.kept[chain[:known]]
            missing |= dict.fromkeys(chain[:n] for n in range(known + 1, len(chain) + 1))
        while missing := {chain: None for chain in missing if chain not in have}:
            # the lowest unit that is next for any: before one runs, chains that skip some below it have arrived too
            ready = [chain for chain in missing if chain[:-1] in have]
            unit = min(chain[-1] for chain in ready)
            batch = [chain for chain in ready if chain[-1] == unit]
            if len(batch) not in starts:
                starts[len(batch)] = self.units.start(self.ids.repeat(len(batch), 1))
            together = torch.cat([have[chain[:-1]] for chain in batch])  # (n·B, T, …)
            out = self.units.apply(unit, together, starts[len(batch)])
            for chain, part in zip(batch, out.split(len(self.ids))):
                have[chain] = part
                self._keep(chain, part)
            self.passes += len(batch)
        return [have[chain] for chain in chains]

    def _keep(self, chain: Chain, hidden: torch.Tensor) -> None:
        self.kept[chain] = hidden
        self.kept_bytes += hidden.nbytes
        while self.kept and self.kept_bytes > self.cache_bytes:
            self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes


class Generation(Answer):
    def __init__(self, model: LoadedModel, units: Units, question: Question, new_tokens: int):
        self.units, self.tokenizer, self.question = units, model.require_tokenizer(), question
        self.prompt, self.new_tokens = opening(model) + self.tokenizer.encode(question.listing), new_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.new_tokens

    def right(self, chains: list[Chain]) -> list[bool]:
        return [self.alone(chain) for chain in chains]

    def alone(self, chain: Chain) -> bool:
        return self.question.accepts(self.text(chain))

    def text(self, chain: Chain) -> str:
        made: list[int] = []
        said = ""
        for token in self.units.next_tokens(chain, self.prompt):
            self.passes += len(chain)
            if token == self.tokenizer.eos_id:
                break
            made.append(token)
            said = continuation(self.tokenizer, self.prompt, made)
            if len(made) == self.new_tokens or "\n" in said.lstrip():
                break
        return said


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (one, other) in enumerate(zip(a, b)) if one != other), min(len(a), len(b)))
