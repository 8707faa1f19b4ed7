"""CoLa as a task: a search for each question, and the two controls that tell what its numbers are worth.

search    the chain that a tree search finds for a question. It sees the right answer, which makes it an upper bound: of
          the chains that guess, some guess right.
random    the same with random chains, as many as the search evaluates. What the search has over it is the search's.
held_out  a chain for all questions of a kind: the tree search's best on one half of them (`simulations` chains, reward
          the share of right answers), tested on the other half, and the other way round. Nothing of it saw the answer
          that it is tested on.

Of a model of recurrent depth there is a third control, with no search at all:

iterations  the model as it is with up to k iterations of its core more or fewer. If the core has settled by then, they
            change next to nothing, and what a search finds is not to be had by them.

A chain that a search finds counts if it also answers right alone (see `answers`), the shortest one first.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple

import torch

from riverrun.eval.depth_search.answers import CACHE_BYTES, Answer, Generation, Likelihood
from riverrun.eval.depth_search.chains import Chain, Space
from riverrun.eval.depth_search.models import Layers
from riverrun.eval.depth_search.questions import Question, fingerprint
from riverrun.eval.depth_search.recurrent import RecurrentUnits
from riverrun.eval.depth_search.search import Evaluate, TreeOptions, best, random_search, tree_search
from riverrun.eval.depth_search.units import Units
from riverrun.eval.models import LoadedModel
from riverrun.eval.samples import Key, collect
from riverrun.modeling.depth.model import DepthModel

VERSION = 1
REWARDS = ("likelihood", "generate")
SEARCHES = {"search": tree_search, "random": random_search}
HELD_OUT, ITERATIONS = "held_out", "iterations"


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
        simulations, leaves, exploration, length_penalty: see `TreeOptions`.
        reward: how a model answers, "likelihood" or "generate".
        k, r: see `Space`.
        new_tokens: of an answer that is generated, at most.

    Raises:
        ValueError: an unknown reward, or numbers that are too small.
    """

    simulations: int = 200
    reward: str = "likelihood"
    k: int = 4
    r: int = 4
    leaves: int = 8
    exploration: float = sqrt(2)
    length_penalty: float = 5.0
    new_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise ValueError(f"there is no reward {self.reward!r}: choose among {', '.join(REWARDS)}")
        least = {"simulations": 2, "k": 1, "r": 1, "leaves": 1, "new_tokens": 1}
        least |= {"exploration": 0, "length_penalty": 0}
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")

    @property
    def tree(self) -> TreeOptions:
        return TreeOptions(self.simulations, self.leaves, self.exploration, self.length_penalty)


class Found(NamedTuple):
    """A line of samples.jsonl: what a search found for a question.

    Attributes:
        base: whether the model as it is answers right.
        chain: the shortest that does; empty if none was found.
        right: whether one was.
        evaluations: chains that were; right_chains: of those, how many answered right.
        passes: forward passes of a unit.
    """

    part: str
    kind: str
    number: int
    base: bool
    right: bool
    chain: list[int]
    evaluations: int
    right_chains: int
    passes: int


class Chosen(NamedTuple):
    """A line of samples.jsonl: a chain chosen on the questions `searched`, and whether it is right for each of
    `tested`."""

    part: str
    kind: str
    half: int
    chain: list[int]
    searched: list[int]
    accuracy: float
    tested: list[int]
    right: list[bool]
    evaluations: int
    passes: int


class Iterated(NamedTuple):
    """A line of samples.jsonl: whether the model answers right after other numbers of iterations, each run alone."""

    part: str
    kind: str
    number: int
    iterations: list[int]
    right: list[bool]
    passes: int


class Records(NamedTuple):
    found: list[Found]
    chosen: list[Chosen]
    iterated: list[Iterated]


def halves(questions: Sequence[Question], kind: str, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of a kind's questions in two parts; the same question asked twice is in one of them."""
    texts = sorted({question.text for question in questions if question.kind == kind})
    Random(f"{seed}/cola/{kind}").shuffle(texts)
    first = set(texts[: len(texts) // 2])
    numbers = [number for number, question in enumerate(questions) if question.kind == kind]
    return [n for n in numbers if questions[n].text in first], [n for n in numbers if questions[n].text not in first]


class Cola:
    """The work on each key.

    Args:
        ask: puts a question to the model; the memory for its cache is divided by the number.
    """

    def __init__(self, plan: Plan, space: Space, questions: Sequence[Question], ask: Callable[[int, int], Answer]):
        self.plan, self.space, self.questions, self.ask = plan, space, questions, ask

    def keys(self) -> list[Key]:
        """Those of single questions, then those of halves. A half is named by what is in it, since that changes with
        the number of questions."""
        parts = [*SEARCHES] if self.space.core is None else [*SEARCHES, ITERATIONS]
        found: list[Key] = [(part, number) for part in parts for number in range(len(self.questions))]
        for kind in dict.fromkeys(question.kind for question in self.questions):
            both = halves(self.questions, kind, self.plan.seed)
            if all(both):
                found += [(HELD_OUT, kind, half, fingerprint([self.questions[n] for n in [*both[0], *both[1]]]))
                          for half in (0, 1)]  # fmt: skip
        return found

    def work(self, keys: list[Key]) -> list[dict[str, Any]]:
        try:
            return [self._record(*key)._asdict() for key in keys]
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the memory of the GPU is too small for {self.plan.leaves} chains at a time: lower --leaves, or leave "
                "out long questions"
            ) from error

    def _record(self, part: str, *key: Any) -> Found | Chosen | Iterated:
        if part == HELD_OUT:
            return self.choose(*key[:2])
        return self.iterate(*key) if part == ITERATIONS else self.find(part, *key)

    def iterate(self, number: int) -> Iterated:
        """The model as it is, and with up to k iterations more or fewer."""
        question, answer, r = self.questions[number], self.ask(number, 1), self.space.iterations
        counts = list(range(max(1, r - self.plan.k), r + self.plan.k + 1))
        right = [answer.alone(self.space.with_iterations(count)) for count in counts]
        return Iterated(ITERATIONS, question.kind, number, counts, right, answer.passes)

    def find(self, part: str, number: int) -> Found:
        question, answer = self.questions[number], self.ask(number, 1)
        # every question has a seed of its own: with one for all, they would find the same chains
        rng = Random(f"{self.plan.seed}/cola/{part}/{question.text}")
        evaluate: Evaluate = lambda chains: [float(right) for right in answer.right(chains)]  # noqa: E731
        rewards = SEARCHES[part](self.space, evaluate, self.plan.tree, rng)
        right = sorted((chain for chain, reward in rewards.items() if reward), key=len)
        chain = next((chain for chain in right if answer.alone(chain)), ())
        base = bool(rewards[self.space.identity])
        return Found(
            part, question.kind, number, base, bool(chain), list(chain), len(rewards), len(right), answer.passes
        )

    def choose(self, kind: str, half: int) -> Chosen:
        """Searches in that half of a kind, and tests in the other."""
        parts = halves(self.questions, kind, self.plan.seed)
        searched, tested = parts[half], parts[1 - half]
        answers = [self.ask(number, len(searched)) for number in searched]

        def evaluate(chains: list[Chain]) -> list[float]:
            return [fmean(rights) for rights in zip(*(answer.right(chains) for answer in answers))]

        rewards = tree_search(self.space, evaluate, self.plan.tree, Random(f"{self.plan.seed}/cola/{kind}/{half}"))
        chain = best(rewards)
        passes, right = sum(answer.passes for answer in answers), list[bool]()
        for number in tested:
            answer = self.ask(number, 1)
            right.append(answer.alone(chain))
            passes += answer.passes
        return Chosen(HELD_OUT, kind, half, list(chain), searched, rewards[chain], tested, right, len(rewards), passes)


def settings(plan: Plan, data: str, model: LoadedModel) -> dict[str, Any]:
    """What samples of one folder share, as JSON types."""
    found = asdict(plan) | {
        "data": data,
        "version": VERSION,
        "model_fingerprint": model.fingerprint,
        "model_dtype": str(model.dtype),
        "tokenizer_fingerprint": model.require_tokenizer().fingerprint,
    }
    return json.loads(json.dumps(found))


def evaluate(
    cola: Cola,
    folder: Path,
    config: dict[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Records:
    """All records: those in `folder`, and the rest, one after another.

    Raises:
        ValueError: see `collect`.
    """
    records = collect(folder, config, cola.keys(), cola.work, batch_size=1, progress=progress)
    return Records(
        [Found(**record) for record in records if record["part"] in SEARCHES],
        [Chosen(**record) for record in records if record["part"] == HELD_OUT],
        [Iterated(**record) for record in records if record["part"] == ITERATIONS],
    )


def run(
    model: LoadedModel,
    plan: Plan,
    questions: Sequence[Question],
    data: str,
    folder: Path,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Records, dict[str, Any], Space]:
    """The task as the command line runs it: records, what they depend on, and the chains there are. A folder of the
    same plan, data and model is gone on with.

    Args:
        data: what identifies the questions, before any limit.
        limit: the first questions only.

    Raises:
        ValueError: a model that chains cannot be made of or that has no tokenizer, a question that it cannot take,
            another configuration in the folder, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} questions leaves nothing to evaluate: give at least 1")
    questions = questions[:limit]
    config, units = settings(plan, data, model), units_of(model)
    space = Space(units.identity, plan.k, plan.r, units.core)

    def ask(number: int, sharers: int) -> Answer:
        if plan.reward == "generate":
            return Generation(model, units, questions[number], plan.new_tokens)
        return Likelihood(model, units, questions[number], CACHE_BYTES // sharers)

    if not model.is_riverrun and model.seq_len is not None:
        longest = max(range(len(questions)), key=lambda number: ask(number, 1).num_tokens)
        if (needed := ask(longest, 1).num_tokens) > model.seq_len:
            raise ValueError(
                f"{model.description} takes at most {model.seq_len} tokens, but question {longest + 1} with its answer "
                f"takes {needed}: leave it out"
            )
    return evaluate(Cola(plan, space, questions, ask), folder, config, progress), config, space


def units_of(model: LoadedModel) -> Units:
    """Raises ValueError for a model that chains cannot be made of."""
    recurrent = isinstance(getattr(model.model, "model", None), DepthModel)
    return RecurrentUnits(model) if recurrent else Layers(model)
