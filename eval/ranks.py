"""The ranks that share an evaluation: those of the process group that runs, or this process alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist

from riverrun.train.distributed import Ranks


class Alone(Ranks):
    """One process without a process group."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def first(self, action: Callable[[], Any]) -> Any:
        return action()


def running() -> Ranks:
    """Its values travel as objects over gloo; a rank's device plays no part."""
    if not dist.is_initialized():
        return Alone(0, 1, 0, torch.device("cpu"))
    return Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
