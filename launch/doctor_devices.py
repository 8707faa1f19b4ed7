"""Products on a device: whether they are right, and how long they take; and what is slow among several devices."""

import statistics
import time
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from riverrun.launch.doctor import Finding

if TYPE_CHECKING:
    import torch

SLOWER = 0.15  # than the median: such a GPU holds up all others
LARGE, SMALL = 8192, 512  # rows and columns: of the timed product on a GPU; of all others
Key = TypeVar("Key", bound=Hashable)


def outliers(seconds: Mapping[Key, float], tolerance: float) -> tuple[dict[Key, float], bool]:
    """Who takes more than 1 + `tolerance` times the usual, and by what fraction more.

    The usual is the median: of an even number of them, the faster one of the two in the middle.

    Returns:
        The slow ones; and whether they are to blame for certain: with three or more to compare, of which fewer than
        half are slow. Otherwise there are two kinds of speed, and neither is the rule.
    """
    if not seconds:
        return {}, True
    usual = statistics.median_low(seconds.values())
    slow = {key: value / usual - 1 for key, value in seconds.items() if value > (1 + tolerance) * usual}
    return slow, not slow or (len(seconds) >= 3 and 2 * len(slow) < len(seconds))


def judge_device(device: str) -> Finding:
    """A small product against float64 on the CPU; then a timed one, whose repetitions must agree to the last bit."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, SMALL, SMALL, generator=generator, dtype=torch.float64)
    exact = a @ b
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    product = (a.to(device, dtype) @ b.to(device, dtype)).double().cpu()
    error = ((product - exact).norm() / exact.norm()).item()
    size = SMALL if device == "cpu" else LARGE
    large = torch.randn(2, size, size, generator=torch.Generator(device).manual_seed(0), dtype=dtype, device=device)
    seconds, same = _timed(large[0], large[1])
    name, group = f"matmul on {device}", "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    detail = (
        f"{dtype}, relative error {error:.1e}, {size}³ in {1e3 * seconds:.2f} ms: "
        f"{2 * size**3 / seconds / 1e12:,.2f} TFLOP/s"
    )
    fix = "update the driver, or take the device out of service"
    if not error <= (1e-5 if dtype == torch.float32 else 1e-2):
        return Finding(name, "problem", detail, f"wrong result: {fix}", seconds, group)
    if not same:
        return Finding(name, "problem", f"{detail}, but not the same bits every time", fix, seconds, group)
    return Finding(name, "ok", detail, value=seconds, group=group)


def _timed(a: "torch.Tensor", b: "torch.Tensor") -> tuple[float, bool]:
    """Seconds that a product takes, the median of a few batches; and whether the last of each batch was the same."""
    import torch

    cuda: Any = torch.cuda if a.is_cuda else None
    batches, each = (7, 10) if cuda else (5, 2)
    first, times = a @ b, []
    out = torch.empty_like(first)
    same = torch.ones((), dtype=torch.bool, device=a.device)
    for _ in range(batches + 1):
        if cuda:
            cuda.synchronize(a.device)
        start = time.perf_counter()
        for _ in range(each):
            torch.matmul(a, b, out=out)
        if cuda:
            cuda.synchronize(a.device)
        times.append((time.perf_counter() - start) / each)
        same &= (out == first).all()
    return statistics.median(times[1:]), bool(same)  # the first batch warms up
