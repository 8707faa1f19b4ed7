"""Benchmarks of the kernels, for `riverrun bench`. The protocol is in docs/benchmark-protocol.md."""

from riverrun.kernels.benchmarks.benchmark import Benchmark
from riverrun.kernels.benchmarks.conv import CAUSAL_CONV1D
from riverrun.kernels.benchmarks.head_rnn import HEAD_RNN
from riverrun.kernels.benchmarks.linear import GATED_DELTA, SSD
from riverrun.kernels.benchmarks.loss import LINEAR_CROSS_ENTROPY
from riverrun.kernels.benchmarks.memory import NEURAL_MEMORY
from riverrun.kernels.benchmarks.norm import GATED_RMS_NORM
from riverrun.kernels.benchmarks.para import PARA_GRU, PARA_LSTM
from riverrun.kernels.benchmarks.scan import DIAGONAL_SCAN

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        PARA_GRU,
        PARA_LSTM,
        HEAD_RNN,
        GATED_DELTA,
        SSD,
        NEURAL_MEMORY,
        DIAGONAL_SCAN,
        CAUSAL_CONV1D,
        GATED_RMS_NORM,
        LINEAR_CROSS_ENTROPY,
    )
}
