"""The peak memory of one GPU in training, by part, for any layout of the ranks: nothing is allocated for it.

What ZeRO holds is read from DeepSpeed 0.19.8 as `train/engine.py` sets it up, with P parameters on a tensor-parallel
rank and d = dp · cp ranks that share a copy of them; 2 bytes are of bf16, and are 4 in fp32 recipes:

- Stage 1 (`BF16_Optimizer`): 2 P weights, 4 P for all gradients in one fp32 buffer, 12 P / d master weights and Adam's
  moments. A parameter's own gradient is added to the buffer and freed at once (`train/zero_gradients.py`). Before the
  step `allreduce_no_retain` copies the buffers of all parameter groups into one, 4 P, after the activations are gone.
- Stage 2 (`DeepSpeedZeroOptimizer`): 2 P weights, 4 P / d gradients (`_build_compact_grad_partition_buffer`), 12 P / d;
  in the backward pass a bucket of `reduce_bucket_size` gradients in bf16 and its fp32 copy for the communication.
- Stage 3: 2 P / d weights, 4 P / d gradients (`grad_partitions_flat_buffer`), 12 P / d; weights gathered for the
  layers at work, up to `max_live_parameters`; a bucket in fp32 that stays, and its copy; in the step the gradients of
  up to `sub_group_size` parameters once more.

Activations come from `launch/footprint.py`, and are put together over the layers as training does: the forward pass
stacks up what each block saves, the backward pass takes it down. The peak is the largest of those moments.

Of layers that run several times (`model.depth`, `model.universal`) the passes with a gradient stack up, as many as
there can be; those without leave nothing. Under recompute an iteration of a core keeps its state alone, and all of its
layers are computed again before its backward pass. Autograd adds up the gradients of all passes before a hook gets
them: the repeated parameters' gradients are alive meanwhile, in the weights' type.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from riverrun.launch.footprint import head_footprint
from riverrun.launch.units import units
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.sharding import meta_model, parameter_plan
from riverrun.train.config import Recipe
from riverrun.train.optim import muon_matrices

GIB = 2**30
BUCKET = 200_000_000  # parameters: `reduce_bucket_size` of train/engine.py
LIVE = 1_000_000_000  # parameters: DeepSpeed's default of `stage3_max_live_parameters`, and of `sub_group_size`

# What torch.cuda.max_memory_allocated does not see, by experience and not counted: the CUDA context with the kernels
# that are loaded, cuBLAS' workspaces; NCCL's buffers of a group of ranks; blocks that the allocator holds but cannot
# use, as a share of what is allocated.
CONTEXT, NCCL_GROUP, FRAGMENTED = 1.0 * GIB, 0.5 * GIB, 0.04


@dataclass(frozen=True)
class Layout:
    """How N = dp · cp · tp GPUs share a recipe's work.

    Attributes:
        micro_batch: rows that the ranks of one dp place compute at once.
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1
    zero_stage: int = 1
    micro_batch: int = 1
    recompute: bool = False

    @property
    def gpus(self) -> int:
        return self.dp * self.cp * self.tp

    def overrides(self) -> dict[str, object]:
        """The recipe's keys that ask for it; dp is what remains of the ranks."""
        return {
            "parallel.tp": self.tp,
            "parallel.cp": self.cp,
            "engine.zero_stage": self.zero_stage,
            "train.micro_batch_size": self.micro_batch,
            "train.recompute": self.recompute,
        }

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with these overrides."""
        sections: dict[str, dict[str, object]] = {}
        for key, value in self.overrides().items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return recipe.model_copy(
            update={name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
        )

    @classmethod
    def of(cls, recipe: Recipe, gpus: int) -> "Layout":
        """What the recipe itself asks for, on so many GPUs."""
        tp, cp = recipe.parallel.tp, recipe.parallel.cp
        rows, recompute = recipe.train.micro_batch_size, recipe.train.recompute
        return cls(gpus // (tp * cp), cp, tp, recipe.engine.zero_stage, rows, recompute)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the moment when most is allocated.

    Attributes:
        moment: which one that is.
        weights, gradients, optimizer: of the parameters, as ZeRO shares them.
        exchange: what ZeRO gathers, buckets or copies at that moment.
        activations: saved for the backward pass, by all layers.
        working: what the block that runs allocates besides; under recompute also all that it saves.
        states: recurrent states that the Triton kernels of that block hold.
        carried: those that the rows of a step pass on to the next, if they do (`train.state_passing`).
        loss: logits of a chunk of tokens and their gradients, that of the head's weight.
        outside: an allowance for what the allocator does not count, or wastes (`CONTEXT`, `NCCL_GROUP`, `FRAGMENTED`).
    """

    moment: str
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    exchange: float = 0.0
    activations: float = 0.0
    working: float = 0.0
    states: float = 0.0
    loss: float = 0.0
    carried: float = 0.0
    outside: float = field(default=0.0, kw_only=True)

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of what is allocated, by name."""
        return {name: value for name, value in vars(self).items() if name not in ("moment", "outside")}

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` would say, and `riverrun train` shows as memory."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """With the allowance: what the GPU must have."""
        return self.allocated + self.outside


@dataclass(frozen=True)
class Held:
    """Parameters of one tensor-parallel rank."""

    numel: int
    tensors: int
    fp32: int  # of them kept in fp32 by stage 1
    muon: int  # of them trained by Muon, which has one moment instead of two
    largest: int
    embedding: int
    repeated: int  # of the layers that run several times on a micro batch


@lru_cache(maxsize=64)
def parameters(options: ModelOptions, tp: int, muon: bool = False) -> Held:
    """Counts of `shard_shapes`' numbers.

    Raises:
        ValueError: sizes that do not divide among `tp` ranks.
    """
    model = meta_model(RiverrunConfig.from_options(options))
    plan = parameter_plan(model, tp)
    orthogonal = muon_matrices(model) if muon else set()
    sizes: dict[str, int] = {}
    for name, p in model.named_parameters():
        split = plan[name]
        sizes[name] = (p.shape if split is None else split.shape(p.shape, tp)).numel()
    params = dict(model.named_parameters())
    embedding = sizes["model.embed_tokens.weight"]
    return Held(
        numel=sum(sizes.values()),
        tensors=len(sizes),
        fp32=sum(n for name, n in sizes.items() if getattr(params[name], "keep_fp32", False)),
        muon=sum(n for name, n in sizes.items() if params[name] in orthogonal),
        largest=max(sizes.values()),
        embedding=embedding,
        repeated=sum(n for name, n in sizes.items() if name.startswith("model.core.")),
    )


def carried(recipe: Recipe, layout: Layout) -> float:
    """Bytes of the states that the rows of a step on one rank leave to the next."""
    if recipe.train.state_passing.mode == "off":
        return 0.0
    model = meta_model(RiverrunConfig.from_options(recipe.model))
    rows = recipe.train.global_batch_size / layout.dp
    return rows * sum(block.mixer.state_bytes(0) for block in model.model.layers)


def predict(recipe: Recipe, layout: Layout) -> Memory:
    """The peak of a rank's memory in training.

    Args:
        recipe: resolved; its own layout does not matter.

    Raises:
        ValueError: the model's sizes do not divide among `layout.tp` ranks.
    """
    worst = max(moments(recipe, layout), key=lambda memory: memory.allocated)
    groups = sum(size > 1 for size in (layout.gpus, layout.dp * layout.cp, layout.dp, layout.cp, layout.tp))
    outside = CONTEXT + NCCL_GROUP * min(groups, 4) + FRAGMENTED * worst.allocated
    return Memory(worst.moment, **worst.parts, outside=outside)


def moments(recipe: Recipe, layout: Layout) -> Iterator[Memory]:
    """Every moment of a step at which memory can be at its peak, `outside` left out."""
    options, dtype = recipe.model, kind(recipe)
    held = parameters(options, layout.tp, recipe.optimizer.name == "muon")
    size, ranks = dtype.itemsize, layout.dp * layout.cp
    stage, P = layout.zero_stage, held.numel
    of_adam = 12 * P - 4 * held.muon
    bucket = min(P, max(BUCKET, held.largest))

    weights = size * P + ((4 - size) * held.fp32 if stage == 1 else 0)
    static = {
        "weights": weights / (ranks if stage == 3 else 1),
        "gradients": 4 * P / (ranks if stage > 1 else 1),
        "optimizer": of_adam / ranks,
        "carried": carried(recipe, layout),
    }
    live = min(P, max(LIVE, held.repeated))  # what runs several times is gathered as a whole
    gathered = {1: 0, 2: 0, 3: size * live + 4 * BUCKET}[stage]
    buckets = 2 if stage == 2 and recipe.engine.overlap_comm else 1  # one is filled while the other is reduced
    reducing = gathered + {1: 0, 2: size * BUCKET * buckets + 4 * bucket, 3: 4 * bucket}[stage]

    tokens = layout.micro_batch * recipe.data.seq_len // layout.cp
    once = rotary(options, tokens, dtype)
    kept = once + 6 * 8 * tokens  # tokens, targets, positions, documents: int64
    tied = size * held.embedding if options.tie_word_embeddings else 0  # the head's gradient waits for the embedding's
    state = tokens * options.hidden_size * size / layout.tp
    for unit in units(options, layout.tp, dtype, layout.recompute, recipe.data.seq_len // layout.cp):
        # of the repeated parameters, and of what each iteration is given besides its state
        added = size * held.repeated + state if unit.repeated else 0
        for moment in unit.moments(tokens, grown=state, added=added):
            memory = {"activations": kept + moment.kept, "working": moment.working, "states": moment.inside}
            more = {"exchange": reducing if moment.backward else gathered, "loss": tied if moment.late else 0}
            yield Memory(moment.name, **static, **memory, **more)
        kept += unit.kept(tokens) + (state if unit.beside else 0)
    head = head_footprint(options, layout.tp, dtype, tokens)
    for name, step in (("forward of the loss", head.forward), ("backward of the loss", head.backward)):
        yield Memory(name, **static, exchange=reducing, activations=kept, loss=step.peak(tokens / head.row)[0])
    gradient = (size + (4 if stage > 1 else 0)) * held.embedding
    yield Memory("backward of the embedding", **static, exchange=reducing, activations=once, working=gradient + tied)
    if stage == 1:
        yield Memory("reduction of the gradients", **static, exchange=4.0 * P)
    if stage == 3:
        yield Memory("step", **static, exchange=4 * BUCKET + 4 * min(P / ranks, LIVE))
    yield Memory("start: weights in fp32", weights=4.0 * P)


def rotary(options: ModelOptions, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the tables that all attention layers share."""
    used = "attention" in options.layers and options.attention.rope
    return 2.0 * tokens * options.attention.head_dim * dtype.itemsize if used else 0.0


def kind(recipe: Recipe) -> torch.dtype:
    """Of parameters and activations."""
    return torch.bfloat16 if recipe.train.dtype == "bf16" else torch.float32
