"""`riverrun bench mixers`: what every mixer costs beside attention, as whole layers of the same width."""

from dataclasses import replace

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender
from riverrun.modeling.benchmarks.layers import NORM_EPS, Make, gated_delta, hidden, mamba2, with_its_own
from riverrun.modeling.memory_options import MEMORY_OPTIONS
from riverrun.modeling.mixer_options import (
    AttentionOptions,
    LSTMOptions,
    Mamba2Options,
    ParaGRUOptions,
    ParaLSTMOptions,
    SLSTMOptions,
)
from riverrun.modeling.mixers import LSTM, MIXERS, SLSTM, Attention, Mixer, ParaGRU, ParaLSTM

HEAD_DIM, WINDOW, BLOCKS = 128, 4096, 8


def attention(case: Case, window: int | None = None) -> Mixer:
    options = AttentionOptions(num_heads=case.H, head_dim=case.D // case.H, window=window)
    return Attention(options.resolve(case.D), case.D, NORM_EPS)


LAYERS: dict[str, tuple[Make, str]] = {
    "attention": (attention, "causal, rotary, over all tokens before"),
    f"attention, window of {WINDOW:,}": (lambda case: attention(case, WINDOW), "causal, rotary"),
    "mamba2": (
        lambda case: mamba2(replace(case, H=Mamba2Options.expand * case.D // Mamba2Options.head_dim)),
        f"inner width 2 D, heads of {Mamba2Options.head_dim}, {Mamba2Options.state_size} states",
    ),
    "gated_delta": (lambda case: gated_delta(replace(case, variant="n=1")), "K = V = D / heads, β to 2"),
    "gated_delta, 2 steps": (lambda case: gated_delta(replace(case, variant="n=2")), "the same, n = 2"),
    "para_gru": (
        lambda case: ParaGRU(ParaGRUOptions(num_heads=BLOCKS).resolve(case.D), case.D, NORM_EPS),
        f"projection in {BLOCKS} blocks",
    ),
    "para_lstm": (
        lambda case: ParaLSTM(ParaLSTMOptions(num_heads=BLOCKS).resolve(case.D), case.D, NORM_EPS),
        f"projection in {BLOCKS} blocks",
    ),
    "lstm": (
        lambda case: LSTM(LSTMOptions().resolve(case.D), case.D, NORM_EPS),
        f"dense heads of {LSTMOptions.head_dim}: one token after another",
    ),
    "slstm": (
        lambda case: SLSTM(SLSTMOptions().resolve(case.D), case.D, NORM_EPS),
        f"dense heads of {SLSTMOptions.head_dim}: one token after another",
    ),
}


def memory(name: str) -> Contender:
    """A mixer with a neural memory."""
    o = MEMORY_OPTIONS[name]()
    return Contender(
        name,
        with_its_own(lambda case: MIXERS[name](o.resolve(case.D), case.D, NORM_EPS)),
        f"as a layer: memories of {o.depth} layers, heads of {o.head_dim}, chunks of {o.chunk_size}",
        same_maths=False,
        min_len=o.chunk_size + 1 if o.read == "chunk" else 1,  # what the first chunk writes is not read in it
    )


def contenders(case: Case) -> list[Contender]:
    found = [
        Contender(name, with_its_own(make), f"as a layer: {note}", same_maths=False)
        for name, (make, note) in LAYERS.items()
    ]
    return [*found, *map(memory, MEMORY_OPTIONS)]


ALL_MIXERS = Benchmark(
    name="mixers",
    inputs=hidden,
    regimes={"fresh": "x ~ N(0, 1), parameters as they start; the layer's column is forward + backward in one go"},
    contenders=contenders,
    reference=with_its_own(attention),
    forward_numbers=lambda case: 2,
    backward_numbers=lambda case: 3,
    formula="forward x and the output; backward x, dL/d output and dx (the matrix products take longer)",
    sequences=("hidden",),
    heads=lambda D, variant: max(1, D // HEAD_DIM),
)
