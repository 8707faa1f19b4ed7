"""`riverrun bench prefix_linear_attention`: JRT-RNN's mixer without projections, beside attention of the same width.

The forward pass is the prefill of a prompt of T tokens, all of them the prefix, as in the paper's table of prefill
times (arXiv 2407.05483): heads of 16 channels of keys and 64 of values. The truth is the same in float64, which takes
the chunked form of `ssd`; the mixer is tested against the masked quadratic form.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Work
from riverrun.kernels.ssd import ssd
from riverrun.modeling.mixer_options import PrefixLinearAttentionOptions
from riverrun.modeling.mixers.prefix_linear_attention import features, normalised, prefix_state, with_ones

DEFAULTS = PrefixLinearAttentionOptions()


def inputs(case: Case, regime: str) -> Inputs:
    """Queries, keys and values of the decoder and the encoder, (B, T, H, channels)."""
    keys, values = DEFAULTS.feature_dim, case.D // case.H

    def made(channels: int) -> torch.Tensor:
        return torch.randn(case.B, case.T, case.H, channels, device=case.device, dtype=case.dtype)

    return {
        "q": made(keys), "k": made(keys), "v": made(values), "encoder_k": made(keys), "encoder_v": made(values),
    }  # fmt: skip


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial: torch.Tensor | None) -> torch.Tensor:
    """What the mixer does to a batch of whole rows."""
    ones, no_decay = q.new_ones(q.shape[:3]), q.new_zeros(q.shape[2], dtype=torch.float32)
    return normalised(ssd(with_ones(v), ones, no_decay, features(k), features(q), initial_state=initial)[0])


def with_prefix(x: Inputs) -> torch.Tensor:
    everything = torch.ones(x["k"].shape[:2], dtype=torch.bool, device=x["k"].device)
    state = prefix_state(features(x["encoder_k"]), with_ones(x["encoder_v"]), everything, None)
    return mix(x["q"], x["k"], x["v"], state)


def causal(x: Inputs) -> torch.Tensor:
    return mix(x["q"], x["k"], x["v"], None)


def twice(x: Inputs) -> torch.Tensor:
    q, k, v = (torch.cat([x[name], x[name]], dim=1) for name in ("q", "k", "v"))
    return mix(q, k, v, None)[:, x["q"].shape[1] :]


def work(function: Callable[[Inputs], torch.Tensor], *names: str) -> Callable[..., Work]:
    def build(x: Inputs, case: Case, load: Load | None = None) -> Work:
        return Work(lambda: function(x), tuple(x[name] for name in names or x))

    return build


def sdpa(x: Inputs, case: Case, load: Load) -> Work:
    """Heads of as many channels in queries and keys as in values, which flash kernels ask for."""
    q, k = (torch.randn_like(x["v"]).requires_grad_() for _ in range(2))
    v = x["v"]

    def run() -> torch.Tensor:
        heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    return Work(run, (q, k, v))


def contenders(case: Case) -> list[Contender]:
    return [
        Contender("riverrun auto", work(with_prefix), "the whole row is the prefix"),
        Contender("riverrun causal", work(causal, "q", "k", "v"), "without a prefix", same_maths=False),
        Contender(
            "riverrun causal, read twice", work(twice, "q", "k", "v"), "2 T tokens: JRT-Prompt", same_maths=False
        ),
        Contender(
            "torch SDPA", sdpa, "other maths: causal softmax, as many channels in keys as in values", same_maths=False
        ),
    ]


PREFIX_LINEAR_ATTENTION = Benchmark(
    name="prefix_linear_attention",
    inputs=inputs,
    regimes={"normal": "q, k, v ~ N(0, 1)"},
    contenders=contenders,
    reference=work(with_prefix),
    forward_numbers=lambda case: 3 + 3 * case.H * DEFAULTS.feature_dim / case.D,
    backward_numbers=lambda case: 5 + 6 * case.H * DEFAULTS.feature_dim / case.D,
    formula="forward q, k, v, the encoder's k and v, and the output; backward the inputs, dL/d output and the inputs' "
    "gradients (features and products take longer)",
    sequences=("q", "k", "v", "encoder_k", "encoder_v"),
    width=1024,
    heads=lambda D, variant: max(1, D // DEFAULTS.head_dim),
)
