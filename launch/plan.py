"""Which layout of ranks trains a recipe fastest on given GPUs, by an estimate of memory and time. Runs on any machine.

Memory is `launch/memory.py`'s. Time is a roofline, in seconds of one optimiser step on one GPU:

    step = micro batches · (max(device, host) + gradients of the micro batch) + gradients of the step + optimiser
    device = products + mixing + traffic + steps through time + tensor-parallel and context-parallel exchange

- products: the FLOPs of weight matrices, those that MFU counts (`flops_per_token`), at `PRODUCTS` of the GPU's peak:
  forward, twice that backward, and once more what is computed again: blocks under recompute, logits under tp. Layers
  that run several times count as often as they do on average (`launch/passes.py`).
- mixing: the mixers' own FLOPs (`mixing_flops`) at `MIXING` of the peak; cells that step through time take `STEPS`.
- traffic: bytes of all operators that are no products with weights (`launch/footprint.py`) at `TRAFFIC` of the speed of
  the GPU's memory.
- host: the time to start all operators, `LAUNCH` each, which hides behind the device's or is what counts.
- exchange: bytes over NVLink within a node of GPUs, over the network beyond. Nothing overlaps: the engine sets
  `overlap_comm` off, and tensor-parallel collectives are on the way of the data. tp never goes beyond a node.

The fractions are measured, one by one, not fitted to a total; estimates of six runs on an H200 were within 7% of what
these ran at (docs/benchmarks.md). Beyond one GPU nothing has been compared: trust the order of layouts that are far
apart.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, isqrt

from riverrun.launch.footprint import head_footprint
from riverrun.launch.memory import GIB, Layout, Memory, kind, parameters, predict
from riverrun.launch.passes import inference_passes, most_graded, passes, work
from riverrun.launch.units import footprints
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.mixers import MIXERS
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.sharding import meta_model
from riverrun.train.config import Recipe
from riverrun.train.metrics import PEAK_FLOPS

PRODUCTS = 0.74  # of the dense peak: 0.72 to 0.77 while models of 1B trained on an H200
TRAFFIC = 0.75  # of the memory's data sheet: a copy has about 0.9, our fused kernels 0.78 of a copy and more
LAUNCH = 8e-6  # seconds of the host an operator, autograd's part included: eager PyTorch has 5 to 10 µs
GATHER = 50e-6  # seconds of the host for each parameter that ZeRO-3 fetches and frees again: a guess
NEAR = 0.97  # of the highest speed: estimates are not more precise than that
NETWORK = 0.8  # of the network's data sheet

# Of the dense peak, for what mixers compute beyond weight matrices, forward and backward together, in rows of 4,096
# tokens on an H200 (docs/benchmarks.md): attention by torch's flash kernels, linear recurrences by ours, with split
# numbers for β to 2. Elementwise cells are traffic.
MIXING = {"attention": 0.26, "mamba2": 0.105, "gated_delta": 0.11}
SPLIT = 0.038
OTHERS = 0.05

# Seconds a token of a row, forward and backward, of cells whose kernels step through time: heads of 64 channels on an
# H200 (docs/benchmarks.md). Rows and heads run side by side, on as many as a GPU has multiprocessors.
STEPS = {
    "slstm": (1.13e-6, 3.46e-6),
    "lstm": (1.14e-6, 2.37e-6),
    "gru": (0.81e-6, 1.92e-6),
    "elman": (0.63e-6, 0.93e-6),
}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, from the makers' data sheets but for what is marked.

    Attributes:
        memory: GiB that torch sees.
        peak: dense bf16 FLOP/s.
        peak_fp32: FLOP/s of products in fp32, without TF32.
        bandwidth: bytes/s of its memory.
        nvlink: bytes/s of bus bandwidth in collectives within a node. Measured between two H200, 305e9; the H100 has
            the same links, the A100 two thirds of their speed.
    """

    name: str
    memory: float
    peak: float
    peak_fp32: float
    bandwidth: float
    nvlink: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 139.8, PEAK_FLOPS["H200"], 67e12, 4.8e12, 305e9),
        Gpu("h100-80g", 79.1, PEAK_FLOPS["H100"], 67e12, 3.35e12, 305e9),
        Gpu("a100-80g", 79.2, PEAK_FLOPS["A100"], 19.5e12, 2.04e12, 203e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """N GPUs of a kind, `node_size` of them in a node, and `network` bytes/s out of a node for each of its GPUs."""

    gpu: Gpu
    gpus: int
    node_size: int = 8
    network: float = 50e9

    def bandwidth(self, layout: Layout, size: int, stride: int) -> float:
        """Bytes/s of a rank in collectives of a group of `size` ranks, `stride` apart: those of a node share what
        enters and leaves it."""
        if size * stride <= self.node_size:
            return self.gpu.nvlink
        return min(self.gpu.nvlink, max(1, self.node_size // stride) * NETWORK * self.network)


@dataclass(frozen=True)
class Flops:
    """A token's.

    Attributes:
        matrices: of the forward pass, products with weights, the head's among them.
        mixing: what the mixers compute beyond that, at the recipe's length, by mixer.
        training: what MFU counts, without recompute: three times the forward pass, but where that has no gradient.
    """

    matrices: float
    mixing: dict[str, float]
    training: float

    @property
    def forward(self) -> float:
        return self.matrices + sum(self.mixing.values())


@dataclass(frozen=True)
class Estimate:
    """A layout, the memory of a GPU and the time of a step.

    Attributes:
        seconds: of an optimiser step, by part; `host` is only what is not hidden.
        tokens_per_second: of all GPUs.
        mfu: model FLOPs by the GPUs' dense peak in the recipe's type, as `riverrun train` shows it.
    """

    layout: Layout
    memory: Memory
    seconds: dict[str, float]
    tokens_per_second: float
    mfu: float


@lru_cache(maxsize=64)
def flops(options: ModelOptions, seq_len: int) -> Flops:
    """From the model's own count (`flops_per_token`, `mixing_flops`)."""
    model = meta_model(RiverrunConfig.from_options(options))
    mixing = dict.fromkeys(options.layers, 0.0)
    for mixer, block, often in zip(options.layers, model.model.layers, inference_passes(options)):
        mixing[mixer] += often * block.mixer.mixing_flops(seq_len)
    forward = model.flops_per_token(seq_len)
    return Flops(forward - sum(mixing.values()), mixing, model.training_flops_per_token(seq_len))


def estimate(recipe: Recipe, layout: Layout, cluster: Cluster) -> Estimate:
    """Memory and time of a layout, whether it fits or not.

    Args:
        recipe: resolved.

    Raises:
        ValueError: the model's sizes do not divide among `layout.tp` ranks.
    """
    micro_batches = recipe.train.global_batch_size / (layout.micro_batch * layout.dp)
    of_micro = _micro_batch(recipe, layout, cluster)
    of_step = _step(recipe, layout, cluster)
    seconds = {name: micro_batches * value for name, value in of_micro.items()}
    for name, value in of_step.items():
        seconds[name] = seconds.get(name, 0.0) + value
    tokens = recipe.train.global_batch_size * recipe.data.seq_len
    speed = tokens / sum(seconds.values())
    peak = cluster.gpu.peak if recipe.train.dtype == "bf16" else cluster.gpu.peak_fp32
    mfu = flops(recipe.model, recipe.data.seq_len).training * speed / (layout.gpus * peak)
    return Estimate(layout, predict(recipe, layout), seconds, speed, mfu)


def _micro_batch(recipe: Recipe, layout: Layout, cluster: Cluster) -> dict[str, float]:
    """Seconds of a micro batch, by part."""
    options, dtype, gpu = recipe.model, kind(recipe), cluster.gpu
    T, tp, cp = recipe.data.seq_len, layout.tp, layout.cp
    tokens = layout.micro_batch * T // cp
    peak = gpu.peak if recipe.train.dtype == "bf16" else gpu.peak_fp32

    head = 2.0 * options.vocab_size * options.hidden_size
    products, mixing = head * (3 if tp == 1 else 4), 0.0
    for part in work(options, T):
        forward, backward = part.passes.ways(layout.recompute)
        products += part.matrices * (forward + 2 * backward)
        if part.mixer is not None and part.mixer not in STEPS:
            # recurrences over context-parallel ranks first find their states (docs/parallelism.md)
            finding = 0 if part.mixer == "attention" else min(cp - 1, 2) / 3
            more = finding * (part.passes.forward + 2 * part.passes.backward)
            split = part.mixer == "gated_delta" and options.gated_delta.allow_neg_eigval
            of_peak = SPLIT if split else MIXING.get(part.mixer, OTHERS)
            mixing += part.mixing * (forward + 2 * backward + more) / of_peak
    moved = stepped = operators = 0.0
    for block, often in footprints(options, tp, dtype, T // cp):
        forward, backward = often.ways(layout.recompute)
        rows = tokens / block.row
        moved += block.forward.moved(rows) * forward + block.backward.moved(rows) * backward
        operators += block.forward.operators(1) * forward + block.backward.operators(1) * backward
    for mixer, often in zip(options.layers, passes(options)):
        if mixer in STEPS:
            forward, backward = often.ways(layout.recompute)
            forward_step, backward_step = STEPS[mixer]  # whole rows: context-parallel ranks wait for each other
            heads = ceil(layout.micro_batch / 16) * getattr(options, mixer).inner_size(options.hidden_size) / 64 / tp
            stepped += ceil(heads / 132) * T * (forward_step * forward + backward_step * backward)
    loss = head_footprint(options, tp, dtype, tokens)
    for way in (loss.forward, loss.backward):
        moved += way.moved(tokens / loss.row)
        operators += way.operators(tokens / loss.row)
    held = parameters(options, tp)
    moved += 18.0 * held.numel  # each gradient, 2 bytes, to fp32 and added to the sum of the step
    moved += 3.0 * dtype.itemsize * held.repeated * (most_graded(options) - 1)  # those of one weight added up

    seconds = {
        "products": products * tokens / tp / (PRODUCTS * peak),
        "mixing": mixing * tokens / tp / peak + stepped,
        "traffic": moved / (TRAFFIC * gpu.bandwidth),
        "tp": _tensor_parallel(options, tokens, layout, dtype.itemsize) / gpu.nvlink,
        "cp": _context_parallel(options, tokens, layout) / cluster.bandwidth(layout, cp, tp),
    }
    seconds["host"] = max(0.0, operators * LAUNCH - sum(seconds.values()))
    ranks = layout.dp * layout.cp
    wire = (ranks - 1) / ranks / cluster.bandwidth(layout, ranks, tp)
    if layout.zero_stage == 2:  # reduced as one bucket of all ranks' parts, which is an all-reduce in fp32
        seconds["zero"] = 2 * 4 * held.numel * wire
    elif layout.zero_stage == 3:  # weights gathered forward and backward, gradients scattered in fp32
        seconds["zero"] = (2 * dtype.itemsize + 4) * held.numel * wire + 2 * GATHER * held.tensors
    return seconds


def _step(recipe: Recipe, layout: Layout, cluster: Cluster) -> dict[str, float]:
    """Seconds of what comes once a step: stage 1 all-reduces fp32 gradients, stages 1 and 2 gather the new weights."""
    P, ranks = parameters(recipe.model, layout.tp).numel, layout.dp * layout.cp
    wire = (ranks - 1) / ranks / cluster.bandwidth(layout, ranks, layout.tp)
    size = kind(recipe).itemsize
    exchanged = {1: 2 * 4 + size, 2: size, 3: 0}[layout.zero_stage] * P * wire
    # Adam reads gradient, weight and two moments and writes three; norm, clipping and zeros go over the gradients
    moved = 28.0 * P / ranks + 20.0 * P / (1 if layout.zero_stage == 1 else ranks)
    return {"zero": exchanged, "optimizer": moved / (TRAFFIC * cluster.gpu.bandwidth)}


def _tensor_parallel(options: ModelOptions, tokens: int, layout: Layout, size: int) -> float:
    """Bytes over a rank's links: a gathering and a scattering sum of all tokens each sublayer and way."""
    runs = sum(sum(often.ways(layout.recompute)) for often in passes(options))
    exchanges = 2 * runs * (2 if options.intermediate_size else 1) + 4  # and embedding and head
    return exchanges * tokens * options.hidden_size * size * (layout.tp - 1) / layout.tp


def _context_parallel(options: ModelOptions, tokens: int, layout: Layout) -> float:
    """Bytes: attention's queries, keys, values and outputs by all-to-all each way, in bf16. States are small."""
    of_layers = [often for mixer, often in zip(options.layers, passes(options)) if mixer == "attention"]
    runs = sum(often.forward + often.backward for often in of_layers)
    if layout.cp == 1:
        return 0.0
    o = options.attention
    channels = 2 * (o.num_heads + o.num_kv_heads) * o.head_dim
    return runs * 2 * channels / layout.tp * tokens * (layout.cp - 1) / layout.cp


# the search


def search(recipe: Recipe, cluster: Cluster, fixed: Mapping[str, object] | None = None) -> list[Estimate]:
    """The layout to take of those that train the recipe and fit: the simplest of the ones `NEAR` the fastest. Then the
    best of the others for each tp, ZeRO stage and recompute, chosen alike, fastest first.

    Args:
        recipe: resolved.
        fixed: keys of `Layout.overrides` that must have this value.

    Raises:
        ValueError: no layout is possible, or none fits; says how to mend it.
    """
    limit, fitting, larger = cluster.gpu.memory * GIB, [], []
    for rising in layouts(recipe, cluster, fixed or {}):
        for layout in rising:
            memory = predict(recipe, layout)
            if memory.total > limit:
                larger.append((layout, memory))
                break  # so do more rows
            fitting.append(estimate(recipe, layout, cluster))
    if not fitting:
        if not larger:
            raise ValueError(_impossible(recipe, cluster, fixed or {}))
        raise ValueError(_too_large(*min(larger, key=lambda each: each[1].total), cluster))
    groups: dict[tuple, list[Estimate]] = {}
    for found in fitting:
        layout = found.layout
        groups.setdefault((layout.tp, layout.zero_stage, layout.recompute), []).append(found)
    first, *rest = (_choose(group) for group in [fitting, *groups.values()])
    return [first, *sorted((e for e in rest if e is not first), key=lambda e: -e.tokens_per_second)]


def _choose(among: list[Estimate]) -> Estimate:
    """The simplest of those near the fastest."""
    enough = NEAR * max(e.tokens_per_second for e in among)
    return min((e for e in among if e.tokens_per_second >= enough), key=lambda e: _complexity(e.layout))


def _complexity(layout: Layout) -> tuple:
    """What to prefer among layouts of about the same speed is the least of it."""
    return layout.tp * layout.cp, layout.cp, layout.zero_stage, layout.recompute, layout.micro_batch


def layouts(recipe: Recipe, cluster: Cluster, fixed: Mapping[str, object]) -> Iterator[list[Layout]]:
    """Every layout that the recipe can be trained with, by the recipe's own rules: lists of those that differ in the
    rows of a micro batch alone, fewest first."""
    N = cluster.gpus
    for tp, stage, recompute in product(_divisors(N), (1, 2, 3), (False, True)):
        for cp in _divisors(N // tp):
            dp = N // (tp * cp)
            if dp * cp == 1 < stage and "engine.zero_stage" not in fixed:
                continue  # there is nobody to share with
            tried = [
                Layout(dp, cp, tp, stage, rows, recompute)
                for rows in _divisors(recipe.train.global_batch_size // dp)
            ]  # fmt: skip
            wanted = [one for one in tried if all(one.overrides()[key] == value for key, value in fixed.items())]
            if found := [layout for layout in wanted if not problems(recipe, layout, cluster)]:
                yield found


def problems(recipe: Recipe, layout: Layout, cluster: Cluster) -> list[str]:
    """Why a recipe cannot be trained with a layout: what `riverrun train` would say, and tp beyond a node."""
    if layout.tp > cluster.node_size:
        return [f"parallel.tp={layout.tp} goes beyond a node of {cluster.node_size}"]
    if recipe.train.global_batch_size % (layout.micro_batch * layout.dp):
        return [
            f"train.global_batch_size={recipe.train.global_batch_size} does not divide into micro batches of "
            f"{layout.micro_batch} on {layout.dp} data-parallel ranks"
        ]
    if layout.zero_stage == 3 and recipe.train.eval_rows < layout.dp:
        return [f"train.eval_rows={recipe.train.eval_rows} is less than {layout.dp} ranks, for engine.zero_stage=3"]
    if layout.cp > 1 and (alone := [m for m in recipe.model.layers if not MIXERS[m].context_parallel]):
        return [f"{alone[0]} cannot share rows: parallel.cp must be 1"]
    changed = layout.applied(recipe)
    return [p for p in changed.problems() if p not in changed.missing()]


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _impossible(recipe: Recipe, cluster: Cluster, fixed: Mapping[str, object]) -> str:
    wanted = " with " + " ".join(f"{k}={_toml(v)}" for k, v in fixed.items()) if fixed else ""
    rows = recipe.train.global_batch_size
    return (
        f"{cluster.gpus} GPUs cannot share recipe {recipe.name}{wanted}: its {rows} rows a step "
        "(train.global_batch_size) do not divide among the ranks that remain once tp and cp divide the model's heads "
        f"and the rows' {recipe.data.seq_len} tokens; take a number of GPUs that does, such as a divisor of {rows}, or "
        "change the global batch"
    )


def _too_large(layout: Layout, memory: Memory, cluster: Cluster) -> str:
    part, size = max(memory.parts.items(), key=lambda item: item[1])
    mend = {"activations": "shorter rows (data.seq_len) or more GPUs", "loss": "shorter rows or more GPUs"}
    return (
        f"no layout of {cluster.gpus} {cluster.gpu.name} fits: the smallest ({name_of(layout)}, "
        f"{describe(layout)}) needs {memory.total / GIB:.1f} GiB a GPU, "
        f"{memory.total / GIB - cluster.gpu.memory:.1f} more than the {cluster.gpu.memory} there are; most of it is "
        f"{part}, {size / GIB:.1f} GiB: take {mend.get(part, 'more GPUs (--gpus)')}, larger GPUs (--gpu) or a smaller "
        "model"
    )


def name_of(layout: Layout) -> str:
    """dp2 x cp1 x tp4, as `Mesh.describe`"""
    return f"dp{layout.dp} x cp{layout.cp} x tp{layout.tp}"


def describe(layout: Layout) -> str:
    """ZeRO-1, 4 rows, recompute"""
    rows = f"{layout.micro_batch} row{'s' * (layout.micro_batch > 1)}"
    return f"ZeRO-{layout.zero_stage}, {rows}{', recompute' * layout.recompute}"


def command_line(layout: Layout) -> str:
    """The overrides to give to `riverrun train`."""
    return " ".join(f"{key}={_toml(value)}" for key, value in layout.overrides().items())


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
