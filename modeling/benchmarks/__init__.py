"""Benchmarks of whole layers, for `riverrun bench`. The protocol is in docs/benchmark-protocol.md."""

from riverrun.kernels.benchmarks.benchmark import Benchmark
from riverrun.modeling.benchmarks.layers import GATED_DELTA_LAYER, MAMBA2_LAYER, TITANS_LMM_LAYER
from riverrun.modeling.benchmarks.mixers import ALL_MIXERS
from riverrun.modeling.benchmarks.prefix_linear_attention import PREFIX_LINEAR_ATTENTION

LAYERS: dict[str, Benchmark] = {
    b.name: b for b in (MAMBA2_LAYER, GATED_DELTA_LAYER, TITANS_LMM_LAYER, PREFIX_LINEAR_ATTENTION, ALL_MIXERS)
}
