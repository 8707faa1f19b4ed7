"""`riverrun bench mamba2_layer`, `gated_delta_layer`, `titans_lmm_layer`: whole mixers, from the layer's input to its
output.

The truth that errors are measured against is the mixer itself in float64, which takes the ops' chunked forms; these are
tested against the step loops.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Unavailable, Work
from riverrun.kernels.benchmarks.linear import delta_inputs, fla_delta
from riverrun.kernels.benchmarks.memory import ALL_STATES
from riverrun.kernels.neural_memory.triton_path import Keep
from riverrun.modeling.layout import Layout, rotary_tables
from riverrun.modeling.memory_options import TitansLMMOptions
from riverrun.modeling.memory_statistics import noting
from riverrun.modeling.mixer_options import AttentionOptions, GatedDeltaOptions, Mamba2Options
from riverrun.modeling.mixers import Attention, GatedDelta, Mamba2, Mixer, TitansLMM
from riverrun.modeling.projection import project

STEPS = {"n=1": 1, "n=2": 2}
MEMORIES = {"linear": (1, 1), "two layers": (2, 64)}  # layers, tokens of a chunk
NORM_EPS = 1e-5
PRODUCTS = "projections alone"

Make = Callable[[Case], Mixer]
Names = Mapping[str, tuple[str, ...]]
"""A peer's parameter → those of ours whose rows it holds, one after another."""


def mamba2(case: Case) -> Mixer:
    return Mamba2(Mamba2Options(head_dim=Mamba2Options.expand * case.D // case.H), case.D, NORM_EPS)


def gated_delta(case: Case) -> Mixer:
    """Keys and values of all heads are as wide as the layer."""
    K, n = case.D // case.H, STEPS[case.variant]
    options = GatedDeltaOptions(num_heads=case.H, head_dim=K, expand_v=1.0, num_householder=n)
    return GatedDelta(options, case.D, NORM_EPS)


def titans_lmm(case: Case, keep: Keep = "root") -> Mixer:
    depth, chunk = MEMORIES[case.variant]
    options = TitansLMMOptions(
        num_heads=case.H, head_dim=case.D // case.H, depth=depth, chunk_size=chunk, keep_states=keep
    )
    return TitansLMM(options, case.D, NORM_EPS)


def fresh(make: Make, case: Case) -> Mixer:
    """The mixer as it starts, its parameters in the types that training holds them in."""
    with torch.device(case.device):
        return as_it_starts(make(case), case.dtype)


def as_it_starts(mixer: Mixer, dtype: torch.dtype) -> Mixer:
    for layer in mixer.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        elif (reset := getattr(layer, "reset_parameters", None)) is not None:
            reset()
    for p in mixer.parameters():
        p.data = p.data if getattr(p, "keep_fp32", False) else p.data.to(dtype)
    return mixer


def hidden(case: Case, regime: str) -> Inputs:
    """A layer's input (B, T, D), as a norm leaves it."""
    return {"hidden": torch.randn(case.B, case.T, case.D, device=case.device, dtype=case.dtype)}


def inputs(make: Make) -> Callable[[Case, str], Inputs]:
    """`hidden`, and the mixer's parameters, by name and in its order."""

    def sample(case: Case, regime: str) -> Inputs:
        weights = {name: p.detach() for name, p in fresh(make, case).named_parameters()}
        return hidden(case, regime) | weights

    return sample


def _holding(make: Make, inputs: Inputs, case: Case) -> Mixer:
    """The mixer with the tensors of `inputs` themselves as its parameters."""
    with torch.device("meta"):
        mixer = make(case)
    mixer.load_state_dict({name: x for name, x in inputs.items() if name != "hidden"}, assign=True)
    return mixer


def _layout(case: Case, mixer: Mixer) -> Layout:
    layout = Layout.of_rows((case.B, case.T), torch.zeros(case.B, dtype=torch.int64, device=case.device))
    if isinstance(mixer, Attention):
        options = mixer.options
        layout.rope = rotary_tables(layout.positions, options.head_dim, options.rope_theta, case.dtype)
    return layout


def _work(run: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Work:
    return Work(run, leaves, run, leaves)


def ours(make: Make) -> Callable[..., Work]:
    def build(inputs: Inputs, case: Case, load: Load | None = None) -> Work:
        return _through(_holding(make, inputs, case), inputs, case)

    return build


def with_its_own(make: Make) -> Callable[..., Work]:
    """A mixer with parameters of its own, whatever `inputs` has beside the layer's input."""
    return lambda inputs, case, load=None: _through(fresh(make, case), inputs, case)


def _through(mixer: Mixer, inputs: Inputs, case: Case) -> Work:
    x, layout = inputs["hidden"], _layout(case, mixer)

    def run() -> torch.Tensor:
        with noting(False):  # as in most steps of training, which are not recorded
            return mixer(x, layout)

    return _work(run, x, *mixer.parameters())


class _Between(torch.autograd.Function):
    """Stands for all that lies between a layer's matrix products, without doing it: `inner` comes out, whatever goes
    in; and `grads` go back."""

    @staticmethod
    def forward(ctx: Any, inner: torch.Tensor, grads: Sequence[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        return inner.view_as(inner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *ctx.grads


def products(make: Make) -> Contender:
    def build(inputs: Inputs, case: Case, load: Load) -> Work:
        mixer, x = _holding(make, inputs, case), inputs["hidden"]
        layers = {name: layer for name, layer in mixer.named_modules() if isinstance(layer, nn.Linear)}
        last = layers.pop("o_proj")
        with torch.no_grad():
            inner = torch.randn(case.B, case.T, last.in_features, device=case.device, dtype=case.dtype)
            grads = [torch.randn_like(y) for y in project(x, *layers.values())]

        def run() -> torch.Tensor:
            return last(_Between.apply(inner, grads, *project(x, *layers.values())))

        return _work(run, x, last.weight, *(layer.weight for layer in layers.values()))

    return Contender(PRODUCTS, build, "the layer's matrix products, forward and backward", same_maths=False)


def attention(case: Case) -> Mixer:
    return Attention(AttentionOptions().resolve(case.D), case.D, NORM_EPS)


ATTENTION = Contender(
    "riverrun attention",
    with_its_own(attention),
    f"other maths: our causal attention layer, heads of {AttentionOptions.head_dim}, rotary",
    same_maths=False,
)


# other packages


def peer(
    name: str, package: str, layer: str, options: Callable[[Case], dict[str, Any]], names: Names, note: str
) -> Contender:
    """The same layer by `layer` of `package`, with our parameters."""

    def build(inputs: Inputs, case: Case, load: Load) -> Work:
        module = load(package)
        if not getattr(module, "is_fast_path_available", True):  # of fla's Mamba2
            raise Unavailable("its kernels are those of mamba_ssm, which is not installed")
        with torch.device(case.device):
            theirs = getattr(module, layer)(**options(case))
        shapes = {n: p.shape for n, p in theirs.named_parameters()}
        packed = {n: torch.cat([inputs[o].detach() for o in names[n]]).view(shape) for n, shape in shapes.items()}
        theirs.load_state_dict(packed, assign=True)

        def run() -> torch.Tensor:
            out = theirs(inputs["hidden"])
            return out[0] if isinstance(out, tuple) else out

        def arrange(grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            found = {"hidden": grads[0]}
            for n, grad in zip(shapes, grads[1:]):
                parts = grad.split([len(inputs[o]) for o in names[n]])
                found |= {o: part.reshape(inputs[o].shape) for o, part in zip(names[n], parts)}
            return [found[o] for o in inputs]

        work = _work(run, inputs["hidden"], *theirs.parameters())
        work.arrange = arrange
        return work

    return Contender(name, build, note, needs_cuda=True)


MAMBA2_NAMES: Names = {
    "in_proj.weight": tuple(f"{n}_proj.weight" for n in ("z", "x", "B", "C", "dt")),
    "conv1d.weight": ("x_conv.weight", "B_conv.weight", "C_conv.weight"),
    "conv1d.bias": ("x_conv.bias", "B_conv.bias", "C_conv.bias"),
    "norm.weight": ("norm_weight",),
    "out_proj.weight": ("o_proj.weight",),
} | {n: (n,) for n in ("A_log", "dt_bias", "D")}

GATED_DELTA_NAMES: Names = {
    **{n: (n,) for n in (*(f"{p}_proj.weight" for p in "qkvbago"), "A_log", "dt_bias")},
    **{f"{p}_conv1d.weight": (f"{p}_conv.weight",) for p in "qkv"},
    "o_norm.weight": ("norm_weight",),
}


def _mamba_ssm(case: Case) -> dict[str, Any]:
    return {"d_model": case.D, "headdim": 2 * case.D // case.H, "d_state": 128, "d_conv": 4, "expand": 2, "ngroups": 1}


def _fla_mamba2(case: Case) -> dict[str, Any]:
    shape = {"state_size": 128, "conv_kernel": 4, "expand": 2, "n_groups": 1, "norm_eps": Mamba2Options.norm_eps}
    return {"hidden_size": case.D, "head_dim": 2 * case.D // case.H} | shape


def _fla_delta(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {
        "hidden_size": case.D, "num_heads": case.H, "head_dim": case.D // case.H, "expand_v": 1.0, "conv_size": 4,
        "allow_neg_eigval": True, "norm_eps": GatedDeltaOptions.norm_eps,
    }  # fmt: skip
    n = STEPS[case.variant]
    return options if n == 1 else options | {"num_householder": n}


def mamba2_contenders(case: Case) -> list[Contender]:
    chunks = "chunks of 256; recomputes in the backward pass"
    return [
        Contender("riverrun auto", ours(mamba2)),
        products(mamba2),
        peer("mamba_ssm", "mamba_ssm.modules.mamba2", "Mamba2", _mamba_ssm, MAMBA2_NAMES, f"its Mamba2, {chunks}"),
        peer("fla", "fla.layers.mamba2", "Mamba2", _fla_mamba2, MAMBA2_NAMES, f"its Mamba2 on mamba_ssm, {chunks}"),
        ATTENTION,
    ]


def gated_delta_contenders(case: Case) -> list[Contender]:
    package, layer = "fla.layers.gated_deltanet", "GatedDeltaNet"
    if STEPS[case.variant] > 1:
        package, layer = "fla.layers.gated_deltaproduct", "GatedDeltaProduct"
    return [
        Contender("riverrun auto", ours(gated_delta)),
        products(gated_delta),
        peer("fla", package, layer, _fla_delta, GATED_DELTA_NAMES, f"its {layer}; its states in bfloat16"),
        ATTENTION,
    ]


def fla_op(inputs: Inputs, case: Case, load: Load) -> Work:
    case = replace(case, variant="n=1")
    own = {name: x.requires_grad_() for name, x in delta_inputs(case, "decaying").items()}
    work = fla_delta(own, case, load)
    return _work(work.forward, *work.leaves)


def titans_lmm_contenders(case: Case) -> list[Contender]:
    return [
        Contender("riverrun auto", ours(titans_lmm)),
        Contender("riverrun all states", ours(partial(titans_lmm, keep="all")), ALL_STATES, needs_cuda=True),
        products(titans_lmm),
        Contender(
            "fla's op",
            fla_op,
            "other maths: chunk_gated_delta_rule alone, of the same heads, without projections",
            same_maths=False,
            needs_cuda=True,
        ),
        Contender(
            "riverrun gated_delta",
            with_its_own(lambda case: gated_delta(replace(case, variant="n=1"))),
            "other maths: our gated delta layer of the same heads",
            same_maths=False,
        ),
        ATTENTION,
    ]


# the benchmarks


def _benchmark(name: str, make: Make, **rest: Any) -> Benchmark:
    def weights(case: Case) -> float:
        """An element."""
        with torch.device("meta"):
            return sum(p.numel() for p in make(case).parameters()) / case.elements

    return Benchmark(
        name=name,
        inputs=inputs(make),
        regimes={"fresh": "x ~ N(0, 1), parameters as they start; the layer's column is forward + backward in one go"},
        reference=ours(make),
        forward_numbers=lambda case: 2 + weights(case),
        backward_numbers=lambda case: 3 + 2 * weights(case),
        formula="forward x, the output, the parameters; backward x, dL/d output, dx, the parameters, their gradients "
        "(the matrix products take longer)",
        sequences=("hidden",),
        products=PRODUCTS,
        **rest,
    )


MAMBA2_LAYER = _benchmark(
    "mamba2_layer",
    mamba2,
    contenders=mamba2_contenders,
    heads=lambda D, variant: max(1, Mamba2Options.expand * D // Mamba2Options.head_dim),
)

GATED_DELTA_LAYER = _benchmark(
    "gated_delta_layer",
    gated_delta,
    contenders=gated_delta_contenders,
    heads=lambda D, variant: max(1, D // GatedDeltaOptions.head_dim),
    variants=tuple(STEPS),
)

TITANS_LMM_LAYER = _benchmark(
    "titans_lmm_layer",
    titans_lmm,
    contenders=titans_lmm_contenders,
    variants=tuple(MEMORIES),
    heads=lambda D, variant: max(1, D // TitansLMMOptions.head_dim),
)
