"""Benchmarks of whole layers, for `riverrun bench`. The protocol is in docs/benchmark-protocol.md."""

from riverrun.kernels.benchmarks.benchmark import Benchmark
from riverrun.modeling.benchmarks.layers import GATED_DELTA_LAYER, MAMBA2_LAYER
from riverrun.modeling.benchmarks.mixers import ALL_MIXERS

LAYERS: dict[str, Benchmark] = {b.name: b for b in (MAMBA2_LAYER, GATED_DELTA_LAYER, ALL_MIXERS)}
