"""How fast training is."""

import time


class Clock:
    """Tokens a second since the last reading, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._tokens, self._start, self._lost = 0, time.perf_counter(), 0.0
        self._pause = 0.0

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        now = time.perf_counter()
        speed = self._tokens / max(now - self._start - self._lost, 1e-9)
        self._tokens, self._start, self._lost = 0, now, 0.0
        return speed

    def paused(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        self._pause = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._lost += time.perf_counter() - self._pause
