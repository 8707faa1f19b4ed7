"""Shared by all tests: one thread a process, so that ranks and helpers do not fight for cores."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "200"  # consoles read it once, when they are made

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests are modules of `tests`, for the ranks that import them
from tests.ranks import Group

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: Triton then runs them in Python


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: compilations for GPUs, up to a minute each. Were one of them a worker's last, the others
    would wait for it."""
    items.sort(key=lambda item: not item.name.startswith(("test_compiles_for", "test_kernels_compile")))


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Group]]:
    """`ranks(n)`: n gloo ranks, the same ones in every test of a file. Idle ones are not kept for other files: gloo
    wakes up 100 times a second for each process group of a rank, which took a third of two cores."""
    groups: dict[int, Group] = {}

    def of(world: int) -> Group:
        if world not in groups or not all(p.is_alive() for p in groups[world].processes):
            groups[world] = Group(world)
        return groups[world]

    yield of
    for group in groups.values():
        group.stop()
