"""Time, memory and bandwidth of a call, on a GPU or a CPU. See docs/benchmark-protocol.md for why it is done so."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP, FEWEST = 3, 5  # calls
BUDGET = 0.5  # seconds of one measurement: slow calls are repeated less often than asked for
FLUSH = 256 << 20  # bytes, more than any cache of level 2
SPIN = 1_000_000  # clock cycles, about half a millisecond


@dataclass(frozen=True)
class Time:
    """In milliseconds, of `repeats` calls."""

    median: float
    min: float
    repeats: int


def measure_time(call: Callable[[], Any], device: torch.device, repeats: int) -> Time:
    """On a GPU between events, with a cold level-2 cache; on a CPU by the clock."""
    fastest = min(call_seconds(call, device) for _ in range(WARM_UP))
    repeats = min(repeats, max(FEWEST, int(BUDGET / fastest)))
    if device.type == "cuda":
        times = _gpu_times(call, device, repeats)
    else:
        times = [1e3 * call_seconds(call, device) for _ in range(repeats)]
    return Time(statistics.median(times), min(times), repeats)


def _gpu_times(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(SPIN)  # the host runs ahead meanwhile: its own time does not count unless it is longer
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def call_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes by the clock, until the device is done."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes of torch's allocator that a call needs beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read and written a second by a copy on the device, at its median time."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (measure_time(lambda: target.copy_(source), device, repeats).median / 1e3)


def free_memory(device: torch.device) -> int | None:
    """Bytes that torch can still have on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    _synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
