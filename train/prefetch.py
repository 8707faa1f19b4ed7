"""The next step's batches, made while the current step is computed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Prefetcher:
    """Calls `make(step)` for the next step in another thread while the current one is computed."""

    def __init__(self, make: Callable[[int], list[Any]], step: int, stop: int):
        self._make, self._next_step, self._stop = make, step, stop
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._future = self._submit()

    def next(self) -> list[Any]:
        assert self._future is not None
        batches = self._future.result()
        self._next_step += 1
        self._future = self._submit()
        return batches

    def _submit(self):
        return self._pool.submit(self._make, self._next_step) if self._next_step < self._stop else None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
