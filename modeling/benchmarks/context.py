"""`riverrun bench-context`: one mixer on rows that several ranks share, against the same rows on one of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

from riverrun.modeling.benchmarks.layers import as_it_starts
from riverrun.modeling.layout import Layout, rotary_tables
from riverrun.modeling.mixers import MIXERS
from riverrun.modeling.mixers.base import Mixer
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import Axis

WARM_UP = 2  # calls
LAYERS = 4  # one after the other, as in a model, whose host runs ahead of its GPU


@dataclass(frozen=True)
class Row:
    """One length of a sequence, B = 1; milliseconds of a layer's forward and backward among several layers, the slowest
    rank's, medians.

    Attributes:
        deviation: of the shared output from the whole's, relative to its norm; the worst rank's.
        communication: the share of the shared time that collectives are under way, once it was looked at.
    """

    length: int
    alone: float
    shared: float
    deviation: float
    communication: float | None = None

    @property
    def speedup(self) -> float:
        return self.alone / self.shared


@dataclass(frozen=True)
class Sequence:
    """A layer, and one sequence for it; called on every rank of `axis` alike.

    Args:
        options: resolved; of the mixer, the model's width.
    """

    mixer: str
    options: ModelOptions
    length: int
    dtype: torch.dtype
    axis: Axis
    device: torch.device

    def measure(self, repeats: int) -> Row:
        layer, whole, upstream = self._drawn()
        alone, shared, mine = self._alone(), self._shared(), self.axis.share(self.length)
        with torch.no_grad():
            want, got = layer(whole, alone)[:, mine].float(), layer(whole[:, mine], shared).float()
        deviation = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
        dist.all_reduce(deviation, dist.ReduceOp.MAX, group=self.axis.group)
        of_whole = _step(layer, whole, upstream, alone)
        of_shard = _step(layer, whole[:, mine].contiguous(), upstream[:, mine].contiguous(), shared)
        one, several = (_slowest(call, self.axis, self.device, repeats) for call in (of_whole, of_shard))
        return Row(self.length, one, several, deviation.item())

    def communication(self) -> float:
        """The share of a shared step that collectives are under way. To be asked when all is timed: a profiler leaves
        hooks behind, in which later launches may spend time."""
        layer, whole, upstream = self._drawn()
        mine = self.axis.share(self.length)
        call = _step(layer, whole[:, mine].contiguous(), upstream[:, mine].contiguous(), self._shared())
        for _ in range(WARM_UP):
            call()
        return _communication(call, self.device)

    def _drawn(self) -> tuple[Mixer, torch.Tensor, torch.Tensor]:
        """The layer, its input and the gradient of its output."""
        torch.manual_seed(0)
        options, size = self.options, self.options.hidden_size
        with torch.device(self.device):
            layer = MIXERS[self.mixer](getattr(options, self.mixer), size, options.norm_eps)
            whole, upstream = (torch.randn(1, self.length, size).to(self.dtype) for _ in range(2))
            return as_it_starts(layer, self.dtype), whole, upstream

    def _alone(self) -> Layout:
        places = torch.zeros(1, dtype=torch.int64, device=self.device)
        return self._with_rope(Layout.of_rows((1, self.length), places))

    def _shared(self) -> Layout:
        context = Context.of_rows(self.axis, 1, self.length, [0, self.length], self.device)
        return self._with_rope(Layout.of_shard(context))

    def _with_rope(self, layout: Layout) -> Layout:
        if self.mixer == "attention":
            options = self.options.attention
            layout.rope = rotary_tables(layout.positions, options.head_dim, options.rope_theta, self.dtype)
        return layout


def _step(layer: Mixer, x: torch.Tensor, upstream: torch.Tensor, layout: Layout) -> Callable[[], Any]:
    x = x.requires_grad_()
    return lambda: torch.autograd.grad(layer(x, layout), [x, *layer.parameters()], upstream)


def _slowest(call: Callable[[], Any], axis: Axis, device: torch.device, repeats: int) -> float:
    """Milliseconds of a layer among several, from when all ranks begin to when all are done."""
    times = []
    for _ in range(WARM_UP + repeats):
        _synchronize(device)
        dist.barrier(axis.group)
        start = time.perf_counter()
        for _ in range(LAYERS):
            call()
        _synchronize(device)
        taken = torch.tensor(time.perf_counter() - start, device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=axis.group)
        times.append(1e3 * taken.item() / LAYERS)
    return statistics.median(times[WARM_UP:])


def _communication(call: Callable[[], Any], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        call()
        _synchronize(device)
        taken = time.perf_counter() - start
    events = profiler.key_averages()
    if on_gpu:
        inside = sum(e.device_time_total for e in events if "nccl" in e.key.lower())
    else:
        inside = sum(e.cpu_time_total for e in events if e.key.startswith("gloo:"))
    return inside / 1e6 / taken


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
