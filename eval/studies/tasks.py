"""The tasks by name."""

from collections.abc import Mapping
from typing import Any

from riverrun.eval.studies.algorithmic import Addition, Copy, Reverse
from riverrun.eval.studies.chomsky import BucketSort, MissingDuplicate, ReverseString, StackManipulation
from riverrun.eval.studies.copying import Copying
from riverrun.eval.studies.groups import A5, S3, S4, S5
from riverrun.eval.studies.memory import NDelayedMatch, NParity
from riverrun.eval.studies.mqar import MQAR
from riverrun.eval.studies.options import build, choose
from riverrun.eval.studies.set_disjointness import SetDisjointness
from riverrun.eval.studies.state_tracking import CycleNavigation, ModularArithmetic, Parity
from riverrun.eval.studies.task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        MQAR, S3, S4, S5, A5, Parity, ModularArithmetic, CycleNavigation, Copying, Copy, Reverse, Addition,
        ReverseString, BucketSort, StackManipulation, MissingDuplicate, SetDisjointness, NParity, NDelayedMatch,
    )
}  # fmt: skip


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """A task with some of its options set.

    Raises:
        ValueError: an unknown task or option, or a value of the wrong type; says which there are.
    """
    return build(name, TASKS[choose("task", name, TASKS)], options or {})
