"""One training run of a study: its full configuration, and what came out."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from riverrun.eval.studies.options import build, choose
from riverrun.eval.studies.scoring import Accuracy
from riverrun.eval.studies.task import SequenceTask, Task
from riverrun.eval.studies.tasks import make_task
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.universal_options import UniversalOptions
from riverrun.modeling.memory_options import MEMORY_OPTIONS
from riverrun.modeling.mixer_options import OPTIONS
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions

VERSION = 1  # of the tasks and the training; results of different versions do not compare

HEAD_DIM, STATE_SIZE = 32, 64  # in place of the mixers' defaults, which suit models of a billion parameters
SMALL: dict[str, dict[str, int]] = {
    "attention": {"head_dim": HEAD_DIM},
    "mamba2": {"head_dim": HEAD_DIM, "state_size": STATE_SIZE},
    "gated_delta": {"head_dim": HEAD_DIM},
    "prefix_linear_attention": {"head_dim": HEAD_DIM, "encoder": False},  # no task reads a prefix
} | {name: {"head_dim": HEAD_DIM} for name in ("slstm", "lstm", "gru", "elman", *MEMORY_OPTIONS)}


@dataclass(frozen=True)
class Run:
    """What defines a run. Times are in optimiser steps; `length` is the task's own measure.

    Attributes:
        mixer_options: those that differ from the mixer's defaults, or from `SMALL`.
        universal: options of a Universal Transformer, whose shared block the layers are; None: they run once.
        validate_every: held-out accuracy at the training length is measured that often; a curriculum goes on to its
            next N where it is high.
        patience: so many times 1.0 in a row end the training, 0: never. A curriculum ends when all N are learnt.
        held_out_rows: sequences of each held-out measurement.
    """

    task: str
    mixer: str
    learning_rate: float
    seed: int
    layers: int
    width: int
    steps: int
    batch_size: int
    train_length: int
    test_lengths: tuple[int, ...]
    validate_every: int
    held_out_rows: int
    task_options: dict[str, Any] = field(default_factory=dict)
    mixer_options: dict[str, Any] = field(default_factory=dict)
    universal: dict[str, Any] | None = None
    patience: int = 3
    version: int = VERSION

    def key(self) -> str:
        """A hash of the whole configuration. The device is no part of it."""
        return hashlib.sha256(json.dumps(given(self), sort_keys=True).encode()).hexdigest()[:16]

    def make_task(self) -> Task:
        return make_task(self.task, self.task_options)

    def model_config(self) -> RiverrunConfig:
        """`layers` blocks of the mixer, which run once or, if it is a Universal Transformer, again and again.

        Raises:
            ValueError: an unknown mixer or option, or a shape that cannot be built.
        """
        choose("mixer", self.mixer, OPTIONS)
        task = self.make_task()
        settings = {k: min(v, self.width) for k, v in SMALL.get(self.mixer, {}).items()} | self.mixer_options
        options = ModelOptions(
            vocab_size=task.vocab_size(self.train_length),
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            layer_pattern=(self.mixer,),
            intermediate_size=None if task.defaults.swiglu else 0,
        )
        if self.universal is not None:  # embeddings nearly as large as those of places, or nothing is learnt for long
            universal = build("universal", UniversalOptions, self.universal)
            options = replace(options, universal=universal, scale_embedding=True, initializer="takase")
        return RiverrunConfig.from_options(
            replace(options, **{self.mixer: build(self.mixer, OPTIONS[self.mixer], settings)})
        )

    def make_model(self, device: torch.device) -> RiverrunForCausalLM:
        """The model as the seed initialises it, in fp32. The caller's random numbers stay as they are."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = RiverrunForCausalLM(self.model_config())
        torch.nn.Module.to(model, device)
        return model

    def check(self) -> None:
        """Raises ValueError with everything that makes the run impossible."""
        positive = ("layers", "width", "steps", "batch_size", "train_length", "validate_every", "held_out_rows")
        found = [f"{n}={getattr(self, n)} must be at least 1" for n in positive if getattr(self, n) < 1]
        if self.patience < 0:
            found.append(f"patience={self.patience} must be at least 1, or 0 to train all steps")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            found.append(f"the learning rate {self.learning_rate} must be positive")
        task = self.make_task()
        found += task.problems((self.train_length, *self.test_lengths))
        if self.universal is not None and not isinstance(task, SequenceTask):
            found.append(f"{self.task} has a curriculum, which trains no halting: leave the options of universal out")
        if found:
            raise ValueError("; ".join(found))
        self.model_config()


def given(settings: Any) -> dict[str, Any]:
    """The fields of a run or study but those that are None, which it had not when these did not exist."""
    return {name: value for name, value in asdict(settings).items() if value is not None}


@dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        score: what the learning rate is chosen by, measured on held-out data at the training length alone: the
            accuracy; of a curriculum the largest N that it passed, 0 if none, and after the point the accuracy at the
            next one.
        by_length: accuracy on test data, at the training length and the test lengths in order.
        steps: that were trained.
        losses: [step, training loss] at each validation.
    """

    score: float
    by_length: list[Accuracy]
    steps: int
    losses: list[tuple[int, float]]
    seconds: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Result":
        """The inverse of `dataclasses.asdict`, through JSON."""
        by_length = [Accuracy(**each) for each in values["by_length"]]
        losses = [(step, loss) for step, loss in values["losses"]]
        return cls(**(values | {"by_length": by_length, "losses": losses}))
