"""`riverrun bench-context`: one mixer on rows that several ranks share, against the same rows on one of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

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
        communication: the share of the shared time that collectives are under way.
        deviation: of the shared output from the whole's, relative to its norm; the worst rank's.
    """

    length: int
    alone: float
    shared: float
    communication: float
    deviation: float

    @property
    def speedup(self) -> float:
        return self.alone / self.shared


def measure(
    mixer: str, options: ModelOptions, length: int, dtype: torch.dtype, axis: Axis, device: torch.device, repeats: int
) -> Row:
    """Called on every rank of `axis` alike.

    Args:
        options: resolved; of the mixer, the model's width.
    """
    torch.manual_seed(0)
    with torch.device(device):
        layer = MIXERS[mixer](getattr(options, mixer), options.hidden_size, options.norm_eps)
        whole = torch.randn(1, length, options.hidden_size).to(dtype)
        upstream = torch.randn(1, length, options.hidden_size).to(dtype)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif (reset := getattr(module, "reset_parameters", None)) is not None:
            reset()
    for param in layer.parameters():
        param.data = param.data if getattr(param, "keep_fp32", False) else param.data.to(dtype)

    mine = axis.share(length)
    alone = Layout.of_rows((1, length), torch.zeros(1, dtype=torch.int64, device=device))
    shared = Layout.of_shard(Context.of_rows(axis, 1, length, [0, length], device))
    if mixer == "attention":
        for layout in (alone, shared):
            layout.rope = rotary_tables(
                layout.positions, options.attention.head_dim, options.attention.rope_theta, dtype
            )
    with torch.no_grad():
        want, got = layer(whole, alone)[:, mine].float(), layer(whole[:, mine], shared).float()
    deviation = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
    dist.all_reduce(deviation, dist.ReduceOp.MAX, group=axis.group)
    of_whole = _step(layer, whole, upstream, alone)
    of_shard = _step(layer, whole[:, mine].contiguous(), upstream[:, mine].contiguous(), shared)
    return Row(
        length,
        _slowest(of_whole, axis, device, repeats),
        _slowest(of_shard, axis, device, repeats),
        _communication(of_shard, device),
        deviation.item(),
    )


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
