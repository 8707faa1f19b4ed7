"""Accuracy of predictions, with an interval. Oracles, guesses and models are scored by the same code."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from riverrun.eval.intervals import wilson
from riverrun.eval.studies.task import IGNORED, SequenceTask

Predictor = Callable[[np.ndarray], np.ndarray]  # inputs (R, T) → the token predicted at each position (R, T)


@dataclass(frozen=True)
class Accuracy:
    """How many answers are right at one length.

    Attributes:
        accuracy: of the scored targets, the mean over the rows.
        low, high: its 95% Wilson interval with the rows as the number of trials. Answers in one row depend on each
            other; the mean of a row varies at most as a coin does, so that the interval is not too narrow.
        exact: the part of the rows without any error.
    """

    length: int
    rows: int
    accuracy: float
    low: float
    high: float
    exact: float


def accuracy(predicted: np.ndarray, targets: np.ndarray, length: int) -> Accuracy:
    """Score (R, A) predictions against targets, of which −100 do not count. Every row has at least one target."""
    counted = targets != IGNORED
    assert counted.any(1).all()
    right = (predicted == targets) & counted
    mean = float((right.sum(1) / counted.sum(1)).mean())
    low, high = wilson(mean, len(targets))
    return Accuracy(length, len(targets), mean, low, high, float((right == counted).all(1).mean()))


def evaluate(task: SequenceTask, predict: Predictor, stream: int, rows: int, length: int) -> Accuracy:
    """Score a predictor on held-out rows: the same ones for every model, rate and seed."""
    inputs, targets = task.batch(stream, 0, 0, rows, length)
    if task.scored == "last":
        targets = np.where(np.arange(targets.shape[1]) == targets.shape[1] - 1, targets, IGNORED)
    return accuracy(predict(inputs), targets, length)
